"use strict";

const PAGE = 12;
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];

/** Make an element; text is always text, never markup. */
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/* Plot: highlighted methods stand out, the others fade. */

function highlight(hovered) {
  const pressed = all("[data-highlight][aria-pressed=true]").map((b) => b.dataset.highlight);
  const lit = hovered === undefined ? pressed : [...pressed, hovered];
  for (const series of all("[data-series]"))
    series.classList.toggle("dim", lit.length > 0 && !lit.includes(series.dataset.series));
}

for (const button of all("[data-highlight]")) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
    highlight();
  });
  for (const event of ["mouseenter", "focus"])
    button.addEventListener(event, () => highlight(button.dataset.highlight));
  for (const event of ["mouseleave", "blur"]) button.addEventListener(event, () => highlight());
}

/* Table: sort by a column, filter by text and budget. */

const table = byId("table");

function sortBy(column, header) {
  const up = header.getAttribute("aria-sort") === "descending" || (column === 0 && !header.hasAttribute("aria-sort"));
  for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => (column === 0 ? value(a).localeCompare(value(b)) : value(a) - value(b));
  const rows = [...table.tBodies[0].rows].sort((a, b) => (up ? compare(a, b) : compare(b, a)));
  table.tBodies[0].append(...rows);
}

function filterRows() {
  const wanted = byId("filter").value.trim().toLowerCase();
  const tokens = byId("filter-budget").value;
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) {
    const named = row.cells[0].textContent.toLowerCase().includes(wanted);
    row.hidden = !named || (tokens !== "" && row.dataset.tokens !== "" && row.dataset.tokens !== tokens);
  }
  byId("rows").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
}

for (const button of table.querySelectorAll("[data-sort]"))
  button.addEventListener("click", () => sortBy(Number(button.dataset.sort), button.closest("th")));
byId("filter").addEventListener("input", filterRows);
byId("filter-budget").addEventListener("change", filterRows);
byId("cells").addEventListener("change", (event) => {
  table.classList.toggle("shares", event.target.value === "share");
});

/* Gallery: one card a question, one picture a method, at the budget of the slider. */

const FEW = 4; // pictures that stand one below the other
let budget = 0;
let limit = PAGE;

/** Paint dropped patches; the style sheet makes them light or dark. */
function veil(bits, [rows, columns]) {
  const canvas = make("canvas", { width: columns, height: rows, "aria-hidden": "true" });
  const bytes = atob(bits);
  const pen = canvas.getContext("2d");
  for (let place = 0; place < rows * columns; place++)
    if (!((bytes.charCodeAt(place >> 3) >> (7 - (place & 7))) & 1))
      pen.fillRect(place % columns, Math.floor(place / columns), 1, 1);
  return canvas;
}

function picture(sample, number, bits, alt) {
  const img = make("img", { src: data.images[sample.images[number]], alt, width: 336, height: 336 });
  return make("div", { class: "picture" }, img, ...(bits ? [veil(bits, sample.grids[number])] : []));
}

function figure(sample, name, text, right, kept) {
  const pictures = sample.images.map((_, number) => {
    const bits = kept && kept[number];
    const tokens = name === "unpruned" ? "all tokens" : bits ? `tokens kept by ${name}` : `${name}, kept tokens not shown`;
    const place = sample.images.length > 1 ? `, image ${number + 1}` : "";
    return picture(sample, number, bits, `${sample.id}${place}, ${tokens}: answer ${text}`);
  });
  const mark = make("span", { class: right ? "more" : "less" }, right ? "✓ " : "✗ ");
  mark.append(make("span", { class: "hidden" }, right ? "right: " : "wrong: "));
  const frames = pictures.length > FEW ? [make("div", { class: "frames" }, ...pictures)] : pictures;
  return make("figure", { "data-method": name }, ...frames, make("figcaption", {}, name, make("br", {}), mark, make("b", {}, text || "(empty)")));
}

/** Numbers of the runs at the slider's budget, of the chosen method or all. */
function shownRuns() {
  const method = byId("method").value;
  return data.runs.flatMap((run, number) =>
    run.budget === budget && (method === "" || run.method === Number(method)) ? [number] : [])
    .sort((a, b) => data.runs[a].method - data.runs[b].method);
}

function card(sample, runs) {
  const figures = runs.filter((run) => sample.answers[run]).map((run) => {
    const { text, right, kept } = sample.answers[run];
    return figure(sample, data.methods[data.runs[run].method], text, right, kept);
  });
  const one = runs.length === 1 ? " one" : "";
  return make("article", { class: "question", "data-id": sample.id },
    make("h3", {}, sample.question),
    make("p", { class: "facts" },
      make("span", {}, "gold ", make("b", {}, sample.gold)),
      make("span", {}, "unpruned ", make("b", {}, sample.baseline || "(empty)")),
      make("span", {}, sample.id)),
    make("div", { class: `pictures${one}` }, figure(sample, "unpruned", sample.baseline, sample.right, null), ...figures));
}

function showGallery() {
  const runs = shownRuns();
  const [outcome, task] = [byId("outcome").value, byId("task").value];
  const fits = data.samples.filter((sample) =>
    (task === "" || sample.task === task) &&
    (outcome === "" || runs.some((run) => sample.answers[run]?.[outcome])));
  byId("cards").replaceChildren(...fits.slice(0, limit).map((sample) => card(sample, runs)));
  byId("shown").textContent = `${fits.length} of ${data.samples.length} questions`;
  byId("more").hidden = fits.length <= limit;
}

function setBudget(value) {
  budget = value;
  for (const slider of all("[data-budget]")) {
    slider.value = value;
    slider.setAttribute("aria-valuetext", data.budgets[value]);
  }
  for (const label of all("[data-budget-label]")) label.textContent = data.budgets[value];
  for (const group of all("[data-group]")) group.hidden = Number(group.dataset.group) !== value;
  if (data.samples.length) showGallery();
}

for (const slider of all("[data-budget]"))
  slider.addEventListener("input", () => setBudget(Number(slider.value)));
if (data.samples.length) {
  for (const id of ["outcome", "task", "method"])
    byId(id).addEventListener("change", () => { limit = PAGE; showGallery(); });
  byId("more").addEventListener("click", () => { limit += PAGE; showGallery(); });
}
filterRows();
setBudget(0);
