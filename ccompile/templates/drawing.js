// The graph around a site: nodes in rows by how deep they lie, top to bottom.
const BOX = { width: 176, line: 14, gap: 18, rise: 30 };

function layout(shown) {
  const nodes = shown.map(([id, touched]) => {
    const [name, op, reads, makes, weights] = data.nodes[id];
    const lines = weights.length > 3 ? [...weights.slice(0, 2), `and ${weights.length - 2} more`] : weights;
    return { name, op, reads, makes, weights, lines, touched, row: 0, height: 38 + BOX.line * lines.length };
  });
  const maker = new Map(nodes.flatMap((node) => node.makes.map((value) => [value, node])));
  const edges = nodes.flatMap((node) => node.reads.filter((value) => maker.has(value)).map((value) => [maker.get(value), node]));
  for (let pass = 0; pass < nodes.length; pass++) {
    let moved = false;
    for (const [from, to] of edges) if (to.row <= from.row && from.row < nodes.length) { to.row = from.row + 1; moved = true; }
    if (!moved) break;
  }
  for (const node of [...nodes].reverse()) {  // what only feeds others stands just above them
    const below = edges.filter(([from]) => from === node).map(([, to]) => to.row);
    const above = edges.some(([, to]) => to === node);
    if (!above && below.length) node.row = Math.max(0, Math.min(...below) - 1);
  }
  return { nodes, edges };
}

function place(nodes, edges) {
  const rows = [];
  for (const node of nodes) (rows[node.row] ||= []).push(node);
  let y = 4;
  const filled = rows.filter(Boolean), width = Math.max(...filled.map((row) => row.length)) * (BOX.width + BOX.gap) - BOX.gap + 8;
  for (const row of filled) {
    const wish = (node) => {
      const from = edges.filter(([, to]) => to === node).map(([one]) => one.x ?? 0);
      return from.length ? from.reduce((sum, value) => sum + value, 0) / from.length : 0;
    };
    row.sort((a, b) => wish(a) - wish(b));
    const start = (width - row.length * (BOX.width + BOX.gap) + BOX.gap) / 2;
    row.forEach((node, index) => { node.x = start + index * (BOX.width + BOX.gap); node.y = y; });
    y += Math.max(...row.map((node) => node.height)) + BOX.rise;
  }
  return [width, y - BOX.rise + 4];
}

function drawGraph(shown, label) {
  const { nodes, edges } = layout(shown), [width, height] = place(nodes, edges);
  const said = label + ": " + nodes.map((node) => node.op + " " + node.name).join(", ");
  const root = svg("svg", { class: "graph", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": said });
  for (const [from, to] of edges) {
    const [x1, y1, x2, y2] = [from.x + BOX.width / 2, from.y + from.height, to.x + BOX.width / 2, to.y], bend = (y2 - y1) / 2;
    root.append(svg("path", { d: `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}` }));
  }
  for (const node of nodes) {
    const middle = node.x + BOX.width / 2;
    root.append(svg("g", { class: node.touched ? "touched" : null },
      svg("title", null, [node.op, node.name, ...node.weights].join("\n")),
      svg("rect", { x: node.x, y: node.y, width: BOX.width, height: node.height, rx: 6 }),
      svg("text", { class: "op", x: middle, y: node.y + 16, "text-anchor": "middle" }, tail(node.op, 24)),
      svg("text", { class: "sub", x: middle, y: node.y + 30, "text-anchor": "middle" }, tail(node.name, 28)),
      node.lines.map((text, index) => svg("text", { class: "sub", x: middle, y: node.y + 30 + BOX.line * (index + 1), "text-anchor": "middle" }, text))));
  }
  return root;
}

function graphPanel(site) {
  const [before, after] = site.graphs || [[], []];
  if (!before.length && !after.length) return null;
  const side = (title, shown) => el("div", null, el("h4", null, title), shown.length ? drawGraph(shown, title) : el("p", { class: "dim" }, "nothing is left here"));
  const box = panel("The graph around it", "nodes that the pass made, changed or took away are framed; weights stand below the op",
    el("div", { class: "pair" }, side("before", before), side(data.undone[site.step] ? "as it was tried, then undone" : "after", after)));
  box.classList.add("wide");
  return box;
}
