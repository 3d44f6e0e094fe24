// Tables that sort, filter, and show a page of rows at a time: thousands of rows cost nothing until they are asked for.
const PAGE = 25;

function makeTable(host, options) {
  const { columns, rows, search, filters, open, label } = options;
  const state = { query: "", picks: filters.map(() => ""), sort: -1, down: false, shown: PAGE, opened: new Set() };
  const texts = rows.map((row) => search(row).toLowerCase());
  const body = el("tbody"), tally = el("span", { class: "tally", role: "status" });
  const more = el("button", { type: "button", class: "more", click: () => { state.shown += 4 * PAGE; draw(); } });

  const query = el("input", { type: "search", placeholder: "Filter by name, op, reason …", "aria-label": "Filter " + label,
    input: () => { state.query = query.value.trim().toLowerCase(); state.shown = PAGE; draw(); } });
  const pickers = filters.map((filter, index) => {
    const picker = el("select", { "aria-label": filter.label, change: () => pick(index, picker.value) },
      el("option", { value: "" }, filter.label), filter.options.map(([value, text]) => el("option", { value }, text)));
    return picker;
  });
  function pick(index, value) { state.picks[index] = value; pickers[index].value = value; state.shown = PAGE; draw(); }

  const heads = columns.map((column, index) => el("th", { scope: "col", class: column.numeric ? "n" : null, "aria-sort": "none" },
    el("button", { type: "button", click: () => sort(index) }, column.label)));
  function sort(index) {
    const first = Boolean(columns[index].numeric);
    state.down = state.sort === index ? !state.down : first;
    state.sort = index;
    heads.forEach((head, at) => head.setAttribute("aria-sort", at !== index ? "none" : state.down ? "descending" : "ascending"));
    draw();
  }

  function compare(a, b) {
    const missing = (value) => value === null || value === undefined || value === "";
    if (missing(a) || missing(b)) return missing(a) - missing(b);  // what is not known comes last, whatever the order
    const order = typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    return state.down ? -order : order;
  }
  function wanted() {
    const words = state.query.split(/\s+/).filter(Boolean);
    const found = rows.map((_, index) => index).filter((index) =>
      words.every((word) => texts[index].includes(word)) &&
      filters.every((filter, at) => !state.picks[at] || filter.test(rows[index], state.picks[at])));
    if (state.sort >= 0) {
      const keys = new Map(found.map((index) => [index, columns[state.sort].key(rows[index])]));
      found.sort((a, b) => compare(keys.get(a), keys.get(b)) || a - b);
    }
    return found;
  }

  function line(index) {
    const row = rows[index], opens = open ? open.can(row) : false;
    const cells = columns.map((column, at) => {
      let content = column.cell(row);
      if (at === 0 && opens) {
        content = el("button", { type: "button", class: "open", "aria-expanded": String(state.opened.has(index)),
          click: () => toggle(index) }, el("span", null, content));
      }
      return el(at ? "td" : "th", { class: column.class || (column.numeric ? "n" : null), scope: at ? null : "row" }, content);
    });
    return el("tr", { "data-row": index }, cells);
  }
  function details(index) {
    return el("tr", { class: "details" }, el("td", { colspan: columns.length }, open.draw(rows[index])));
  }
  function toggle(index) {
    const row = body.querySelector('tr[data-row="' + index + '"]');
    const opening = !state.opened.delete(index);
    if (opening) { state.opened.add(index); row.after(details(index)); } else row.nextElementSibling.remove();
    row.querySelector(".open").setAttribute("aria-expanded", String(opening));
  }

  function draw() {
    const found = wanted(), part = found.slice(0, state.shown);
    body.replaceChildren(...part.flatMap((index) => (state.opened.has(index) ? [line(index), details(index)] : [line(index)])));
    if (!found.length) body.append(el("tr", null, el("td", { colspan: columns.length, class: "empty" }, "Nothing matches this filter.")));
    tally.textContent = found.length === rows.length ? rows.length + " in all" : found.length + " of " + rows.length;
    more.hidden = found.length <= part.length;
    more.textContent = "Show more: " + (found.length - part.length) + " left";
  }

  host.replaceChildren(
    el("div", { class: "controls" }, query, pickers, tally),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
      el("table", null, el("thead", null, el("tr", null, heads)), body)),
    more);
  draw();
  return {
    find(text) { query.value = text; state.query = text.toLowerCase(); state.shown = PAGE; draw(); host.scrollIntoView({ block: "start" }); },
  };
}

function segments(names, chosen, pick, label) {
  const buttons = names.map((name, index) => el("button", { type: "button", "aria-pressed": String(index === chosen), click: () => {
    buttons.forEach((button, at) => button.setAttribute("aria-pressed", String(at === index)));
    pick(index);
  } }, name));
  return el("div", { class: "segments", role: "group", "aria-label": label }, buttons);
}
