"use strict";
// A box in which names are looked for: `choose` is told the number of the one that is taken.
// Returns what closes the list of names.
function searchBox(names, query, list, choose) {
  const LISTED = 30;
  // A field of one line has no line ends, so names are looked for without them.
  const lower = names.map((name) => name.toLowerCase().replace(/[\r\n]/g, ""));
  let rows = [], marked = 0;

  // Numbers of the names that hold a text: the name itself first, then those that begin with it.
  function find(text) {
    const wanted = text.trim().toLowerCase();
    if (!wanted) return [];
    const found = [];
    lower.forEach((name, row) => {
      const at = name.indexOf(wanted);
      if (at >= 0) found.push([name === wanted ? 0 : at === 0 ? 1 : 2, name, row]);
    });
    found.sort((a, b) => a[0] - b[0] || (a[1] < b[1] ? -1 : 1));
    return found.map((each) => each[2]);
  }

  function item(text, kind) {
    const made = document.createElement("li");
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function show() {
    const all = find(query.value);
    rows = all.slice(0, LISTED);
    const items = rows.map((row, at) => {
      const made = item(names[row]);
      made.setAttribute("role", "option");
      made.id = `${list.id}-${at}`;
      made.addEventListener("mousedown", (event) => { event.preventDefault(); take(row); });
      return made;
    });
    if (query.value.trim() && !rows.length) items.push(item("no such model", "none"));
    const more = all.length - rows.length;
    if (more) items.push(item(`and ${more.toLocaleString("en")} more`, "none"));
    list.replaceChildren(...items);
    open(items.length > 0);
  }

  function open(shown) {
    list.hidden = !shown;
    query.setAttribute("aria-expanded", String(shown));
    mark(0);
  }

  function mark(number) {
    marked = number;
    rows.forEach((_, at) => {
      const made = list.children[at];
      made.setAttribute("aria-selected", String(at === marked));
      if (at === marked) made.scrollIntoView({ block: "nearest" });
    });
    if (rows.length && !list.hidden) {
      query.setAttribute("aria-activedescendant", `${list.id}-${marked}`);
    } else {
      query.removeAttribute("aria-activedescendant");
    }
  }

  function take(row) {
    query.value = names[row];
    open(false);
    choose(row);
  }

  query.addEventListener("input", show);
  query.addEventListener("focus", show);
  query.addEventListener("blur", () => open(false));
  query.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && rows.length) take(rows[marked]);
    if (event.key === "Escape") open(false);
    if ((event.key === "ArrowDown" || event.key === "ArrowUp") && rows.length) {
      event.preventDefault();
      mark((marked + (event.key === "ArrowDown" ? 1 : rows.length - 1)) % rows.length);
    }
  });
  return () => open(false);
}
