"use strict";
// Zoom a Plotly map with two fingers: what was between them at first stays between them.
function pinchToZoom(map, onStart) {
  let start = null;
  const points = (event) => [...event.touches].map((touch) => [touch.clientX, touch.clientY]);
  const gap = ([a, b]) => Math.hypot(a[0] - b[0], a[1] - b[1]) || 1;
  const ours = (event) => { event.preventDefault(); event.stopPropagation(); };

  // The share of the map's width, or height, that lies before the middle of two points.
  function middle([a, b]) {
    const { xaxis, yaxis } = map._fullLayout;
    const box = map.getBoundingClientRect();
    return {
      x: ((a[0] + b[0]) / 2 - box.left - xaxis._offset) / xaxis._length,
      y: 1 - ((a[1] + b[1]) / 2 - box.top - yaxis._offset) / yaxis._length,
    };
  }

  function zoomed(range, scale, from, to) {
    const span = range[1] - range[0];
    const low = range[0] + span * from - span * scale * to;
    return [low, low + span * scale];
  }

  const options = { capture: true, passive: false };
  map.addEventListener("touchstart", (event) => {
    start = null;
    if (event.touches.length !== 2) return;
    ours(event);
    onStart();
    const { xaxis, yaxis } = map._fullLayout;
    start = { at: points(event), x: [...xaxis.range], y: [...yaxis.range] };
    start.middle = middle(start.at);
  }, options);
  map.addEventListener("touchmove", (event) => {
    if (!start || event.touches.length !== 2) return;
    ours(event);
    const now = points(event);
    const scale = gap(start.at) / gap(now);
    const to = middle(now);
    Plotly.relayout(map, {
      "xaxis.range": zoomed(start.x, scale, start.middle.x, to.x),
      "yaxis.range": zoomed(start.y, scale, start.middle.y, to.y),
    });
  }, options);
}
