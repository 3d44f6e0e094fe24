// What stands where.
function progress() {
  const host = document.getElementById("progress"), { labels, cost, accuracy, moved } = data.progress;
  if (labels.length < 2) return;
  const charts = [
    progressChart("Cost", "share of the source", labels, cost, (value) => percent(value, 0)),
    progressChart("Accuracy", "on the verification data", labels, accuracy, (value) => (isNumber(value) ? value.toFixed(3) : "–")),
    progressChart("Outputs moved", "relative L2 against the source, on a logarithmic scale", labels, [["relative L2", moved]], number, true),
  ];
  host.replaceChildren(...charts.filter(Boolean));
}

function costCell(layer, measure) {
  const [was, now] = [layer.before[measure.index], layer.after[measure.index]], said = change(was, now);
  const kind = now < was * (1 - 5e-4) ? "less" : now > was * (1 + 5e-4) ? "grown" : "dim";
  if (!was && !now) return el("span", { class: "dim" }, "0");
  return [measure.form(now), el("br"), el("span", { class: kind, title: "before: " + measure.form(was) }, said)];
}
function layerName(layer) {
  const heirs = layer.now.map(([name]) => name).filter((name) => name !== layer.name);
  const shown = heirs.slice(0, 4).map((name) => (name.startsWith(layer.name) ? "…" + name.slice(layer.name.length) : name));
  const more = heirs.length > 4 ? ` and ${heirs.length - 4} more` : "";
  return [layer.name, heirs.length ? el("span", { class: "options", title: heirs.slice(0, 40).join("\n") }, "→ " + shown.join(", ") + more) : null];
}
const stepTags = (steps) => steps.map((step) => el("span", { class: "tag" }, data.steps[step]));

function layerTable() {
  const host = document.getElementById("layer-table");
  if (!data.layers.length) {
    host.replaceChildren(el("p", { class: "empty" }, "This evidence records no layers: it was written by an older ccompile. Compile again to see them."));
    return null;
  }
  const columns = [
    { label: "Layer", class: "name", key: (one) => one.name, cell: layerName },
    { label: "Op", key: (one) => one.op, cell: (one) => one.op },
    { label: "Passes", key: (one) => one.steps.length, cell: (one) => stepTags(one.steps) },
    ...MEASURES.map((measure) => ({ label: measure.name, numeric: true, key: (one) => one.after[measure.index], cell: (one) => costCell(one, measure) })),
    { label: "Drift", numeric: true, key: (one) => one.drift, cell: (one) => number(one.drift) },
  ];
  const differs = (one) => one.before.some((value, index) => Math.abs(value - one.after[index]) > 5e-4 * value);
  return makeTable(host, {
    columns, rows: data.layers, label: "layers",
    search: (one) => [one.name, one.op, ...one.now.flat(), ...one.steps.map((step) => data.steps[step])].join(" "),
    filters: [{ label: "All layers", options: [["yes", "Changed in cost"], ["no", "Unchanged in cost"]], test: (one, value) => differs(one) === (value === "yes") }],
  });
}

function mostChanged() {
  const sum = (which, measure) => data.layers.reduce((total, one) => total + one[which][measure.index], 0);
  const shares = MEASURES.map((measure) => Number((sum("after", measure) / (sum("before", measure) || 1)).toFixed(2)));
  return shares.indexOf(Math.min(...shares));
}
function layerCharts(table) {
  const host = document.getElementById("layer-charts");
  if (!table) return;
  const chart = el("div"), show = (index) => chart.replaceChildren(layerChart(MEASURES[index], (name) => table.find(name)));
  const first = mostChanged();
  host.replaceChildren(el("div", { class: "controls" }, segments(MEASURES.map((one) => one.name), first, show, "Measure of cost")), chart);
  show(first);
}

function siteDetails(site) {
  const chosen = site.curve.find((one) => one[5]), rank = chosen && chosen[0] === "split-svd" ? chosen[1] : 0;
  const panels = [curveChart(site), site.weight ? histogram(site.weight) : null, site.weight ? spectrum(site.weight, rank) : null, graphPanel(site)];
  const facts = site.names.length > 1 ? el("p", { class: "dim" }, "Nodes: " + site.names.join(", ")) : null;
  const bound = isNumber(site.bound) ? el("p", { class: "dim" }, `Bound on |dy| / |x|: ${number(site.bound)}, measured ${number(site.gain)}`) : null;
  return [facts, bound, el("div", { class: "panels" }, panels)].filter(Boolean);
}
function siteTable() {
  const host = document.getElementById("site-table");
  if (!data.sites.length) {
    host.replaceChildren(el("p", { class: "empty" }, "No pass found a place to act on, or one to leave alone."));
    return;
  }
  const weighed = data.sites.some((one) => isNumber(one.impact));
  const lost = (one) => (isNumber(one.measured) ? one.measured : one.error);
  const columns = [
    { label: "Site", class: "name", key: (one) => one.names[0], cell: (one) => (one.names.length > 1 ? `${one.names[0]} and ${one.names.length - 1} more` : one.names[0]) },
    { label: "Pass", key: (one) => one.step, cell: (one) => stepTags([one.step]) },
    { label: "Outcome", key: (one) => (data.undone[one.step] && one.acted ? 1 : one.acted ? 0 : 2), cell: (one) => (one.acted ? el("span", { class: "chip " + (data.undone[one.step] ? "warn" : "good") }, data.undone[one.step] ? "undone" : "acted") : el("span", { class: "dim" }, "left alone")) },
    { label: "Error", numeric: true, key: lost, cell: (one) => number(lost(one)) },
    ...(weighed ? [{ label: "Impact", numeric: true, key: (one) => one.impact, cell: (one) => number(one.impact) }] : []),
    { label: "Cost left", numeric: true, key: (one) => one.share, cell: (one) => (isNumber(one.share) ? el("span", { title: UNITS[one.unit] || "" }, percent(one.share)) : "–") },
    { label: "What", class: "note", key: (one) => one.note, cell: (one) => one.note },
  ];
  makeTable(host, {
    columns, rows: data.sites, label: "sites", search: (one) => [...one.names, one.note, data.steps[one.step]].join(" "),
    filters: [
      { label: "All passes", options: data.steps.map((name, index) => [String(index), name]), test: (one, value) => one.step === Number(value) },
      { label: "Acted and left alone", options: [["yes", "Acted"], ["no", "Left alone"]], test: (one, value) => one.acted === (value === "yes") },
    ],
    open: { can: (one) => one.curve.length > 1 || Boolean(one.weight) || Boolean(one.graphs && (one.graphs[0].length || one.graphs[1].length)), draw: siteDetails },
  });
}

progress();
layerCharts(layerTable());
siteTable();
document.documentElement.dataset.ready = "yes";
