// Charts as SVG, drawn at the width that there is.
function panel(title, note, ...children) {
  return el("figure", { class: "panel" }, el("figcaption", null, title, note ? el("span", null, note) : null), children);
}
function fitted(draw, least = 240) {
  const host = el("div");
  let last = 0;
  function fit() {
    const width = Math.max(least, Math.floor(host.clientWidth));
    if (width === last || !host.isConnected) return;
    last = width;
    host.replaceChildren(draw(width));
  }
  queueMicrotask(fit);  // when what is being built has its place
  new ResizeObserver(() => requestAnimationFrame(fit)).observe(host);
  return host;
}
function legend(items) {
  return el("ul", { class: "legend" }, items.map(([kind, text]) => el("li", { class: kind }, el("i"), text)));
}
const scale = (from, to, start, end) => (value) => start + ((value - from) / (to - from || 1)) * (end - start);

function logTicks(least, most) {
  const low = Math.floor(Math.log10(least)), high = Math.ceil(Math.log10(most)), step = Math.ceil((high - low) / 4) || 1;
  const ticks = [];
  for (let power = low; power <= high; power += step) ticks.push(10 ** power);
  return ticks;
}
const power = (value) => (value >= 0.01 && value <= 1000 ? String(Number(value.toPrecision(2))) : "1e" + String(Math.round(Math.log10(value))).replace("-", "−"));

function frame(width, height, label, left = 44) {
  const root = svg("svg", { class: "chart", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  return { root, left, right: width - 12, top: 10, bottom: height - 24 };
}
function gridlines(box, ticks, y, form) {
  for (const tick of ticks) {
    box.root.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, form(tick)));
  }
}
function niceTicks(least, most) {
  const raw = (most - least) / 4 || 1, unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((by) => by * unit >= raw);
  const ticks = [];
  for (let tick = Math.ceil(least / step - 1e-9) * step; tick <= most + step * 1e-6; tick += step) ticks.push(Number(tick.toPrecision(12)));
  return ticks;
}

// What happens from pass to pass. series: [name, values, form].
function progressChart(title, note, labels, series, form, log = false) {
  const known = series.flatMap(([, values]) => values).filter((value) => isNumber(value) && (!log || value > 0));
  if (known.length < 2) return null;
  let least = Math.min(...known), most = Math.max(...known), ticks;
  if (log) { ticks = logTicks(least, most); [least, most] = [ticks[0], Math.max(most, ticks[ticks.length - 1])]; }
  else if (note === "share of the source") { ticks = niceTicks(0, Math.max(1, most)); least = 0; most = Math.max(1, most); }
  else { const pad = Math.max((most - least) * 0.15, 0.002); least -= pad; most = Math.min(1, most) === most ? Math.min(1, most + pad) : most + pad; ticks = niceTicks(least, most); }
  const draw = (width) => {
    const box = frame(width, 190, title + ": " + series.map(([name, values]) => name + " " + form(values[values.length - 1])).join(", "), 50);
    const x = scale(0, Math.max(labels.length - 1, 1), box.left + 8, box.right - 8);
    const y = log ? (value) => scale(Math.log10(least), Math.log10(most), box.bottom, box.top)(Math.log10(value)) : scale(least, most, box.bottom, box.top);
    gridlines(box, ticks, y, log ? power : form);
    series.forEach(([name, values], at) => {
      const points = values.map((value, index) => [x(index), value, index]).filter(([, value]) => isNumber(value) && (!log || value > 0));
      const same = ([, others]) => others.every((value, index) => Math.abs(value - values[index]) < 0.01 * (most - least));
      const under = series.slice(at + 1).filter(same).length;  // lines that coincide show one inside the other
      box.root.append(svg("path", { class: "line s" + at, "stroke-width": 1.8 + 2.2 * under, d: points.map(([px, value], index) => (index ? "L" : "M") + px + " " + y(value)).join("") }));
      for (const [px, value, index] of points) {
        box.root.append(svg("circle", { class: "dot s" + at, cx: px, cy: y(value), r: 3.5 + 1.2 * under, mousemove: (event) => showTip(event, labels[index] + "\n" + name + " " + form(value)), mouseleave: hideTip }));
      }
    });
    const every = Math.ceil((labels.length * 30) / (box.right - box.left));
    labels.forEach((text, index) => {
      if (index % every === 0) box.root.append(svg("text", { x: x(index), y: box.bottom + 17, "text-anchor": "middle" }, index ? text.split(" ")[0] : "src"));
    });
    return box.root;
  };
  return panel(title, note, fitted(draw), legend(series.map(([name, values], at) => ["s" + at, name + " " + form(values[values.length - 1])])));
}

// Cost and drift of every layer over one axis.
function layerChart(measure, find) {
  const layers = data.layers, before = layers.map((one) => one.before[measure.index]), after = layers.map((one) => one.after[measure.index]);
  const most = Math.max(...before, ...after) || 1, drifts = layers.map((one) => one.drift);
  const known = drifts.filter((value) => isNumber(value) && value > 0);
  const draw = (space) => {
    const step = Math.max(4, Math.min(64, (space - 62) / layers.length)), width = Math.max(space, step * layers.length + 62);
    const box = frame(width, known.length ? 270 : 170, `${measure.long} and drift of ${layers.length} layers; the table below has the numbers`, 50);
    const floor = 146, x = (index) => box.left + index * step, bars = (values, share) => values.map((value, index) => {
      const height = (value / most) * (floor - 14), side = (step * (1 - share)) / 2;
      return height > 0 ? `M${x(index) + side} ${floor}v${-height}h${step * share}v${height}z` : "";
    }).join("");
    gridlines(box, niceTicks(0, most), scale(0, most, floor, 14), measure.form);
    box.root.append(svg("path", { class: "pale", d: bars(before, 0.82) }), svg("path", { class: "solid", d: bars(after, 0.46) }));
    if (known.length) {
      const ticks = logTicks(Math.max(Math.min(...known), 1e-9), Math.max(...known)), low = Math.log10(ticks[0]), high = Math.log10(Math.max(ticks[ticks.length - 1], ...known));
      const y = (value) => scale(low, high, 258, 176)(Math.log10(Math.max(value, ticks[0])));
      gridlines(box, ticks, y, power);
      drifts.forEach((value, index) => { if (value > 0) box.root.append(svg("circle", { class: "dot s1", cx: x(index) + step / 2, cy: y(value), r: Math.min(3.2, step / 2) })); });
    }
    const cursor = svg("rect", { class: "hit", y: 8, width: step, height: box.bottom + 14, x: -99 });
    const at = (event) => Math.floor((event.clientX - box.root.getBoundingClientRect().left - box.left) / step);
    box.root.append(cursor);
    box.root.addEventListener("mousemove", (event) => {
      const one = layers[at(event)];
      if (!one) return hideTip();
      cursor.setAttribute("x", x(at(event)));
      cursor.setAttribute("fill-opacity", 0.07);
      const [was, now] = [one.before[measure.index], one.after[measure.index]];
      showTip(event, `${one.name}\n${measure.form(was)} → ${measure.form(now)} (${change(was, now) || "0"})\ndrift ${number(one.drift)}`);
    });
    box.root.addEventListener("mouseleave", hideTip);
    box.root.addEventListener("click", (event) => { const one = layers[at(event)]; if (one) find(one.name); });
    return box.root;
  };
  const note = known.length ? "above: cost; below: drift, on a logarithmic scale" : "no drift was measured";
  const scroll = el("div", { class: "plot", tabindex: "0", role: "region", "aria-label": "Chart of layers" }, fitted(draw));
  return panel(measure.long[0].toUpperCase() + measure.long.slice(1) + " per layer", note, scroll, legend([["pale", "source"], ["s0", "result"], ["s1", "drift"]]));
}

// What was weighed at a site: cost against what it loses.
function curveChart(site) {
  if (site.curve.length < 2) return null;
  const most = Math.max(...site.curve.map((one) => one[4])) || 1, byImpact = site.curve.every((one) => isNumber(one[3]));
  const lost = (one) => (byImpact ? one[3] : one[2]), values = site.curve.map(lost).filter((value) => isNumber(value) && value > 0);
  if (!values.length) return null;
  const ticks = logTicks(Math.max(Math.min(...values), Math.max(...values) * 1e-7), Math.max(...values));
  const names = [...new Set(site.curve.map((one) => one[0]))].filter((name) => name !== "none");
  const low = Math.log10(ticks[0]), high = Math.log10(Math.max(ticks[ticks.length - 1], ...values));
  const draw = (width) => {
    const box = frame(width, 200, "what was weighed: cost against loss", 48);
    const x = scale(0, 1, box.left + 6, box.right - 8), y = (value) => scale(low, high, box.bottom, box.top)(Math.log10(Math.max(value, ticks[0])));
    gridlines(box, ticks, y, power);
    for (const share of [0, 0.5, 1]) box.root.append(svg("text", { x: x(share), y: box.bottom + 17, "text-anchor": share === 1 ? "end" : "middle" }, percent(share, 0)));
    names.forEach((name, at) => {
      const points = site.curve.filter((one) => one[0] === name && isNumber(lost(one))).map((one) => [x(one[4] / most), y(lost(one))]);
      box.root.append(svg("path", { class: "line s" + at, "stroke-opacity": 0.45, d: points.map(([px, py], index) => (index ? "L" : "M") + px + " " + py).join("") }));
    });
    for (const one of site.curve) {
      const [px, py, at] = [x(one[4] / most), y(lost(one) || ticks[0]), Math.max(0, names.indexOf(one[0]))];
      const said = `${one[0]} ${number(one[1])}${one[5] ? " (chosen)" : ""}\n${percent(one[4] / most)} of the cost\nloses ${number(one[2])}${isNumber(one[3]) ? ", outputs " + number(one[3]) : ""}`;
      if (one[5]) box.root.append(svg("circle", { class: "ring", cx: px, cy: py, r: 7 }));
      box.root.append(svg("circle", { class: "dot s" + at, cx: px, cy: py, r: 3.5, mousemove: (event) => showTip(event, said), mouseleave: hideTip }));
    }
    return box.root;
  };
  const note = `${byImpact ? "what it does to the outputs" : "share of the output’s power lost"} against ${UNITS[site.unit] || "cost"}; the ring is the choice`;
  return panel("What was weighed", note, fitted(draw), names.length > 1 ? legend(names.map((name, at) => ["s" + at, name])) : null);
}

function histogram(weight) {
  const root = (value) => Math.sqrt(value), most = root(Math.max(...weight.before, ...weight.after)) || 1, bins = weight.before.length;
  const draw = (width) => {
    const box = frame(width, 200, "histogram of the weight", 12), step = (box.right - box.left) / bins;
    const bars = (values, share) => values.map((value, index) => {
      const height = (root(value) / most) * (box.bottom - box.top), side = (step * (1 - share)) / 2;
      return height > 0 ? `M${box.left + index * step + side} ${box.bottom}v${-height}h${step * share}v${height}z` : "";
    }).join("");
    box.root.append(svg("path", { class: "pale", d: bars(weight.before, 0.9) }), svg("path", { class: "solid", d: bars(weight.after, 0.45) }),
      svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    for (const [share, anchor] of [[-1, "start"], [0, "middle"], [1, "end"]]) {
      box.root.append(svg("text", { x: scale(-1, 1, box.left, box.right)(share), y: box.bottom + 17, "text-anchor": anchor }, share ? (share < 0 ? "−" : "") + number(weight.limit) : "0"));
    }
    return box.root;
  };
  const zeros = weight.zeros_after === null ? percent(weight.zeros_before) : percent(weight.zeros_before) + " → " + percent(weight.zeros_after);
  return panel("Weight " + weight.shape.join(" × "), "how its values are spread (root scale); zeros " + zeros, fitted(draw),
    legend(weight.after.length ? [["pale", "before"], ["s0", "after"]] : [["pale", "before"]]));
}

function spectrum(weight, rank) {
  const values = weight.spectrum.filter((value) => value > 1e-6);
  if (values.length < 2) return null;
  const ticks = logTicks(Math.min(...values), 1), last = weight.ranks[weight.ranks.length - 1];
  const draw = (width) => {
    const box = frame(width, 200, "singular values of the weight", 48);
    const x = scale(1, last, box.left + 6, box.right - 8), y = (value) => scale(Math.log10(ticks[0]), 0, box.bottom, box.top)(Math.log10(Math.max(value, ticks[0])));
    gridlines(box, ticks, y, power);
    box.root.append(svg("path", { class: "line s0", d: weight.spectrum.map((value, index) => (index ? "L" : "M") + x(weight.ranks[index]) + " " + y(value)).join("") }));
    if (rank > 0) box.root.append(svg("line", { class: "rule", x1: x(rank), x2: x(rank), y1: box.top, y2: box.bottom }), svg("text", { class: "strong", x: x(rank), y: box.bottom + 17, "text-anchor": "middle" }, "rank " + rank));
    box.root.append(svg("text", { x: box.right, y: box.bottom + 17, "text-anchor": "end" }, rank > last * 0.8 ? "" : last));
    return box.root;
  };
  return panel("Singular values", "of the weight before, the largest 1" + (rank > 0 ? "; the rule is the rank kept" : ""), fitted(draw));
}
