"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const map = $("map");
  const COUNT = data.models.length;
  const PALETTE = data.palette;
  const REST = data.rest;
  const MARKER = COUNT > 3000 ? 5 : COUNT > 400 ? 7 : 10;
  const FLIGHT_MS = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 450;
  const KIND = hasWebGL() ? "scattergl" : "scatter";
  const MOST_LINES = 2000; // more are drawn when they are asked for: without a GPU they take seconds
  const state = { column: data.colour, selected: null, groups: [], hidden: new Set() };

  // ------------------------------------------------------------------ what is drawn

  function hasWebGL() {
    try {
      return Boolean(document.createElement("canvas").getContext("webgl"));
    } catch {
      return false;
    }
  }

  // Numbers of a column, if all that are there are numbers and they are many.
  function numbersOf(column) {
    const known = data.columns[column].filter((value) => value !== null);
    const all = known.length > 0 && known.every((value) => typeof value === "number");
    return all && new Set(known).size > PALETTE.length ? data.columns[column] : null;
  }

  function groupsOf(column) {
    if (column === "") return [{ label: "models", colour: PALETTE[0], rows: [...Array(COUNT).keys()] }];
    const rowsOf = new Map();
    data.columns[column].forEach((value, row) => {
      const label = value === null ? null : String(value);
      if (!rowsOf.has(label)) rowsOf.set(label, []);
      rowsOf.get(label).push(row);
    });
    const unknown = rowsOf.get(null) || [];
    rowsOf.delete(null);
    const order = new Intl.Collator("en", { numeric: true }).compare;
    const sorted = [...rowsOf].sort((a, b) => b[1].length - a[1].length || order(a[0], b[0]));
    const shown = sorted.length > PALETTE.length ? PALETTE.length : sorted.length;
    const groups = sorted.slice(0, shown).map(([label, rows], at) => (
      { label, rows, colour: PALETTE[at] }
    ));
    const rest = sorted.slice(shown);
    if (rest.length) {
      groups.push({ label: `${rest.length} others`, rows: rest.flatMap((each) => each[1]), colour: REST });
    }
    if (unknown.length) groups.push({ label: "unknown", rows: unknown, colour: REST });
    return groups;
  }

  function style(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function points(rows, marker) {
    return {
      type: KIND, mode: "markers", hoverinfo: "none", customdata: rows,
      x: rows.map((row) => data.x[row]), y: rows.map((row) => data.y[row]),
      marker: { size: MARKER, opacity: 0.85, line: { width: 0 }, ...marker },
    };
  }

  function lines() {
    const x = [], y = [];
    for (const line of data.lines) {
      for (const row of line) { x.push(data.x[row]); y.push(data.y[row]); }
      x.push(null); y.push(null);
    }
    return {
      type: KIND, mode: "lines", hoverinfo: "skip", x, y, visible: $("lines").checked,
      line: { width: 1, color: style("--faint") }, opacity: 0.6,
    };
  }

  function chosen() {
    const row = state.selected;
    const x = [], y = [];
    if (row !== null) {
      for (const near of data.nearest[row]) {
        x.push(data.x[row], data.x[near.row], null);
        y.push(data.y[row], data.y[near.row], null);
      }
    }
    const ring = row === null ? [] : [row, ...data.nearest[row].map((near) => near.row)];
    const colour = style("--strong");
    return [
      { type: "scatter", mode: "lines", hoverinfo: "skip", x, y, line: { width: 1.5, color: colour } },
      {
        type: "scatter", mode: "markers", hoverinfo: "skip",
        x: ring.map((each) => data.x[each]), y: ring.map((each) => data.y[each]),
        marker: {
          size: ring.map((_, at) => MARKER + (at ? 5 : 10)), color: "rgba(0,0,0,0)",
          line: { width: ring.map((_, at) => (at ? 1.5 : 3)), color: colour },
        },
      },
    ];
  }

  // Colours of numbers. Of those that span powers of ten, as sizes of models do, most would have
  // one colour; they are told apart by their logarithms.
  function shades(numbers) {
    let low = Infinity, high = -Infinity;
    for (const value of numbers) { low = Math.min(low, value); high = Math.max(high, value); }
    const colorbar = { thickness: 12, outlinewidth: 0, tickfont: { color: style("--text") } };
    if (!(low > 0 && high >= data.wide * low)) return { color: numbers, colorbar };
    const powers = [];
    for (let power = Math.ceil(Math.log10(low)); power <= Math.log10(high); power += 1) {
      powers.push(power);
    }
    const written = new Intl.NumberFormat("en", { notation: "compact" });
    return {
      color: numbers.map(Math.log10),
      colorbar: { ...colorbar, tickvals: powers, ticktext: powers.map((power) => written.format(10 ** power)) },
    };
  }

  function traces() {
    const numbers = state.column === "" ? null : numbersOf(state.column);
    let models;
    if (numbers) {
      const known = numbers.flatMap((value, row) => (value === null ? [] : [row]));
      const unknown = numbers.flatMap((value, row) => (value === null ? [row] : []));
      state.groups = [];
      models = [
        points(unknown, { color: REST }),
        points(known, {
          ...shades(known.map((row) => numbers[row])), colorscale: "Viridis", showscale: true,
        }),
      ];
    } else {
      state.groups = groupsOf(state.column);
      models = state.groups.map((group, at) => ({
        ...points(group.rows, { color: group.colour }), visible: !state.hidden.has(at),
      }));
    }
    return [...(data.lines.length ? [lines()] : []), ...models, ...chosen()];
  }

  function axis(other) {
    return {
      visible: Boolean(data.axes), zeroline: false, gridcolor: style("--edge"),
      title: { text: data.axes ? data.axes[other] : "" }, automargin: true,
    };
  }

  function layout() {
    const before = map._fullLayout;
    const kept = before ? { x: [...before.xaxis.range], y: [...before.yaxis.range] } : whole();
    return {
      showlegend: false, dragmode: "pan", hovermode: "closest", hoverdistance: 14,
      margin: data.axes ? { l: 56, r: 16, t: 12, b: 48 } : { l: 8, r: 8, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: style("--text") },
      xaxis: { ...axis(0), range: kept.x },
      yaxis: { ...axis(1), range: kept.y, scaleanchor: "x" },
    };
  }

  function draw() {
    const options = { responsive: true, scrollZoom: true, displaylogo: false, displayModeBar: false };
    return Plotly.react(map, traces(), layout(), options).then(legend);
  }

  // ------------------------------------------------------------------ words

  function element(tag, text, kind) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function show(value) {
    return value === null ? "unknown" : String(value);
  }

  function klOf(near) {
    const error = near.error === null ? "?" : show(near.error);
    const high = near.high === null ? "∞" : show(near.high);
    const noise = near.noise ? ", below the noise of mixed dtypes" : "";
    return { short: `${show(near.kl)} ± ${error}`, interval: `${show(near.low)} to ${high}${noise}` };
  }

  function factsOf(row) {
    const facts = [];
    if (data.bits[row] !== null) facts.push(["bits per byte", data.bits[row].toFixed(4)]);
    for (const [column, values] of Object.entries(data.columns)) {
      if (values[row] !== null) facts.push([column, show(values[row])]);
    }
    return facts;
  }

  function tip(row, event) {
    const box = $("tip");
    const family = data.columns.family ? show(data.columns.family[row]) : null;
    const bits = data.bits[row] === null ? null : `${data.bits[row].toFixed(4)} bits per byte`;
    const table = element("table");
    for (const near of data.nearest[row]) {
      const line = element("tr");
      const kl = klOf(near);
      line.append(element("td", data.models[near.row]), element("td", `${kl.short} [${kl.interval}]`));
      table.append(line);
    }
    box.replaceChildren(
      element("div", data.models[row], "name"),
      element("div", [family, bits].filter(Boolean).join(" · "), "fact"),
      table,
    );
    box.hidden = false;
    const gap = 16;
    const { width, height } = box.getBoundingClientRect();
    const left = event.clientX + gap + width > innerWidth ? event.clientX - gap - width : event.clientX + gap;
    const top = Math.min(event.clientY + gap, innerHeight - height - 4);
    box.style.left = `${Math.max(4, left)}px`;
    box.style.top = `${Math.max(4, top)}px`;
  }

  function about() {
    const row = state.selected;
    $("about").hidden = row === null;
    if (row === null) return;
    $("name").textContent = data.models[row];
    $("facts").replaceChildren(...factsOf(row).flatMap(([name, value]) => (
      [element("dt", name), element("dd", value)]
    )));
    $("nearest").replaceChildren(...data.nearest[row].map((near) => {
      const item = element("li");
      const button = element("button", data.models[near.row]);
      button.type = "button";
      button.addEventListener("click", () => {
        select(near.row).then(() => fly(near.row));
        $("name").focus();
      });
      const kl = klOf(near);
      item.append(button, element("span", `${kl.short} ${data.unit} (${kl.interval})`, "kl"));
      return item;
    }));
    $("about").scrollIntoView({ block: "nearest" });
  }

  function legend() {
    $("legendTitle").textContent = state.column === "" ? "Models" : state.column;
    $("legendBox").hidden = !state.groups.length;
    const focused = [...$("legend").children].indexOf(document.activeElement);
    $("legend").replaceChildren(...state.groups.map((group, at) => {
      const button = element("button");
      const dot = element("span", undefined, "dot");
      dot.style.background = group.colour;
      button.type = "button";
      button.setAttribute("aria-pressed", String(!state.hidden.has(at)));
      button.append(dot, element("span", group.label || "(empty)", "label"),
        element("span", group.rows.length.toLocaleString("en"), "count"));
      button.addEventListener("click", () => {
        if (!state.hidden.delete(at)) state.hidden.add(at);
        draw();
      });
      return button;
    }));
    if (focused >= 0) $("legend").children[focused]?.focus();
  }

  // ------------------------------------------------------------------ moving about

  function select(row) {
    state.selected = row;
    state.groups.forEach((group, at) => { if (group.rows.includes(row)) state.hidden.delete(at); });
    about();
    return draw();
  }

  function whole() {
    const ends = (values) => {
      let low = Infinity, high = -Infinity;
      for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
      return [low, high];
    };
    const x = ends(data.x), y = ends(data.y);
    // Both have one scale, and models in a line have no extent across it.
    const edge = 0.06 * Math.max(x[1] - x[0], y[1] - y[0]) || 1;
    return { x: [x[0] - edge, x[1] + edge], y: [y[0] - edge, y[1] + edge] };
  }

  let flight = 0;
  function moveTo(target) {
    const own = ++flight;
    $("tip").hidden = true;
    const { xaxis, yaxis } = map._fullLayout;
    const from = { x: [...xaxis.range], y: [...yaxis.range] };
    const begin = performance.now();
    const mix = (a, b, share) => a.map((value, at) => value + share * (b[at] - value));
    const step = (now) => {
      if (own !== flight) return;
      const passed = FLIGHT_MS ? Math.min(1, (now - begin) / FLIGHT_MS) : 1;
      const share = passed * passed * (3 - 2 * passed);
      Plotly.relayout(map, {
        "xaxis.range": mix(from.x, target.x, share), "yaxis.range": mix(from.y, target.y, share),
      });
      if (passed < 1) requestAnimationFrame(step);
    };
    step(FLIGHT_MS ? begin : begin + 1);
  }

  // To a model, so near that its neighbours on the map are still in sight.
  function fly(row) {
    const all = whole();
    const away = data.x.map((x, other) => Math.hypot(x - data.x[row], data.y[other] - data.y[row]));
    const near = away.sort((a, b) => a - b)[Math.min(4, COUNT - 1)];
    const span = Math.max(
      0.12 * Math.max(all.x[1] - all.x[0], all.y[1] - all.y[0]), 2.2 * near,
    );
    const { w, h } = map._fullLayout._size;
    const across = (span * w) / Math.min(w, h) / 2;
    const up = (span * h) / Math.min(w, h) / 2;
    moveTo({
      x: [data.x[row] - across, data.x[row] + across], y: [data.y[row] - up, data.y[row] + up],
    });
  }

  // ------------------------------------------------------------------ the rest of the tools

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    return draw();
  }

  for (const column of ["", ...Object.keys(data.columns)]) {
    const option = element("option", column === "" ? "none" : column);
    option.value = column;
    $("colour").append(option);
  }
  $("colour").value = state.column;
  $("colour").addEventListener("change", () => {
    state.column = $("colour").value;
    state.hidden.clear();
    draw();
  });
  $("linesLabel").hidden = !data.lines.length;
  $("lines").checked = data.lines.length <= MOST_LINES;
  $("lines").addEventListener("change", draw);
  $("reset").addEventListener("click", () => moveTo(whole()));
  const closeSearch = searchBox(data.models, $("query"), $("found"), (row) => {
    select(row).then(() => fly(row));
  });
  $("close").addEventListener("click", () => {
    select(null);
    $("query").focus();
    closeSearch();
  });
  $("theme").addEventListener("click", () => (
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark")
  ));
  $("notes").textContent = data.notes;

  const hold = () => { flight += 1; $("tip").hidden = true; };
  map.addEventListener("wheel", hold, { capture: true, passive: true });
  pinchToZoom(map, hold);
  if (innerWidth <= 720) $("legendBox").open = false;

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(prefersDark.matches ? "dark" : "light").then(() => {
    map.on("plotly_hover", ({ points: [point], event }) => {
      if (point.customdata !== undefined) tip(point.customdata, event);
    });
    map.on("plotly_unhover", () => { $("tip").hidden = true; });
    new ResizeObserver(() => Plotly.Plots.resize(map)).observe(map);
    map.on("plotly_click", ({ points: [point] }) => {
      if (point.customdata !== undefined) select(point.customdata);
    });
    document.body.dataset.ready = "true";
  });
  prefersDark.addEventListener("change", () => setTheme(prefersDark.matches ? "dark" : "light"));
})();
