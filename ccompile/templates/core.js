"use strict";
// Elements, numbers and the theme. Texts come from models: they become text nodes, never markup.
const data = JSON.parse(document.getElementById("data").textContent);

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
function count(value) {
  for (const [limit, unit] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]])
    if (Math.abs(value) >= limit) return Number((value / limit).toPrecision(4)) + unit;
  return String(Number(value.toPrecision(4)));
}
const size = (value) => (value >= 1e3 ? count(value) + "B" : Math.round(value) + " B");
function duration(value) {
  if (!value) return "0";
  const [scale, unit] = value >= 1 ? [1, " s"] : value >= 1e-3 ? [1e3, " ms"] : [1e6, " µs"];
  return Number((value * scale).toPrecision(3)) + unit;
}
function number(value) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const small = Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5;
  return small ? value.toExponential(1).replace("-", "−") : String(Number(value.toPrecision(3)));
}
const percent = (value, digits = 1) => (isNumber(value) ? (value * 100).toFixed(digits) + " %" : "–");
function change(before, after) {
  if (!before) return after ? "new" : "";
  if (!after) return "gone";
  const share = after / before - 1;
  return Math.abs(share) < 5e-4 ? "±0 %" : (share < 0 ? "−" : "+") + percent(Math.abs(share));
}
const tail = (text, most) => (text.length > most ? "…" + text.slice(1 - most) : text);

const MEASURES = [
  { name: "Time", long: "estimated time", form: duration },
  { name: "MACs", long: "multiply-adds", form: count },
  { name: "Stored", long: "bytes stored", form: size },
  { name: "Params", long: "parameters", form: count },
].map((one, index) => ({ ...one, index: [3, 1, 2, 0][index] }));
const UNITS = { stored_bytes: "bytes stored", macs: "multiply-adds", params: "parameters", seconds: "estimated time" };

// ------------------------------------------------------------------------------------------ theme
(function theme() {
  const button = document.getElementById("theme"), root = document.documentElement;
  const modes = ["auto", "light", "dark"];
  const store = (mode) => { try { localStorage.setItem("ccompile-theme", mode); } catch { /* a file may keep nothing */ } };
  const stored = () => { try { return localStorage.getItem("ccompile-theme"); } catch { return null; } };
  function show(mode) {
    if (mode === "auto") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", mode);
    button.textContent = "Theme: " + mode;
    button.dataset.mode = mode;
  }
  show(modes.includes(stored()) ? stored() : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    const mode = modes[(modes.indexOf(button.dataset.mode) + 1) % modes.length];
    show(mode);
    store(mode);
  });
})();

// ------------------------------------------------------------------------------------------ tip
const tip = document.getElementById("tip");
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 14;
  const left = event.clientX + gap + box.width > innerWidth ? event.clientX - gap - box.width : event.clientX + gap;
  const top = event.clientY + gap + box.height > innerHeight ? event.clientY - gap - box.height : event.clientY + gap;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, top) + "px";
}
const hideTip = () => { tip.hidden = true; };
