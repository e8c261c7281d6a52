"use strict";
// Documents are untrusted: their text becomes text nodes and attributes of elements made here, never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const ROLES = { t: "target", p: "prompt", n: "never" };
const MEANING = { target: "learned", prompt: "prompt, read only", never: "never a target", picture: "image" };

const number = (value) => value.toLocaleString("en-US");
const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

function size(bytes) {
  const prefixes = ["", "k", "M", "G", "T"];
  let power = 0;
  for (; bytes >= 1000 && power < prefixes.length - 1; power += 1) bytes /= 1000;
  return `${power ? bytes.toFixed(1) : bytes} ${prefixes[power]}B`;
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Statistics.

function facts(dataset) {
  const list = make("dl", { class: "facts" });
  for (const [name, value] of [
    ["documents", number(dataset.documents)],
    ["sequences", number(dataset.sequences)],
    ["tokens", number(dataset.tokens)],
    ["prompt tokens", number(dataset.prompt_tokens)],
    ["targets", number(dataset.target_tokens)],
    ["images", number(dataset.images)],
    ...(dataset.tiles ? [["tiles", number(dataset.tiles)], ["image tokens", number(dataset.model_tokens)]] : []),
    [".bin file", size(dataset.stored_bytes)],
    ["image files", size(dataset.image_bytes)],
  ])
    list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  return list;
}

const short = (value) => (value >= 1 << 20 ? `${value >> 20}M` : value >= 1024 ? `${value >> 10}k` : `${value}`);

function histogram(title, { mean, smallest, largest, bins }) {
  const width = 320, height = 120, top = 6, bottom = 16;
  const most = Math.max(...bins.map((bin) => bin[2]));
  const step = width / Math.max(bins.length, 6);
  const label = `${title}: ${number(Math.round(mean * 10) / 10)} on average, ${number(smallest)} to ${number(largest)}`;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height + bottom}`, role: "img", "aria-label": label });
  bins.forEach(([first, last, count], index) => {
    const tall = ((height - top) * count) / most;
    const x = index * step;
    const hint = `${number(first)}${first === last ? "" : `–${number(last)}`}: ${number(count)}`;
    if (count)
      svg.append(
        draw("rect", { x: x + 1, y: height - Math.max(tall, 1), width: step - 2, height: Math.max(tall, 1), rx: 1.5 }),
      );
    svg.append(
      draw("text", { x: x + step / 2, y: height + 12, "text-anchor": "middle" }, short(first)),
      draw("rect", { class: "hit", x, y: 0, width: step, height, "data-hint": hint, "data-count": count }),
    );
  });
  svg.append(draw("line", { x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5 }));
  const range = `${number(Math.round(mean * 10) / 10)} on average, ${number(smallest)} to ${number(largest)}`;
  return make("figure", {}, make("h3", {}, title), make("p", { class: "quiet" }, range), svg);
}

function table(head, rows) {
  const body = make("tbody");
  for (const { cells, kind = "" } of rows)
    body.append(make("tr", { class: kind }, ...cells.map((cell) => make("td", {}, cell))));
  const titles = make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)));
  return make("div", { class: "table" }, make("table", {}, make("thead", {}, titles), body));
}

function sources(dataset) {
  const names = ["documents", "tokens", "images", ...(dataset.tiles ? ["tiles"] : [])];
  const rows = dataset.sources.map(([name, ...counts]) => ({
    cells: [make("span", { class: "path" }, name), ...counts.slice(0, names.length).map(number)],
  }));
  const list = table(["source", ...names], rows);
  if (dataset.more_sources)
    list.append(make("p", { class: "quiet" }, `and ${plural(dataset.more_sources, "more source")}`));
  return list;
}

function showStatistics() {
  const section = document.getElementById("statistics");
  if (data.datasets.length > 1) {
    const names = ["documents", "tokens", "targets", "images"];
    if (data.datasets.some((one) => one.tiles)) names.push("tiles");
    const counts = (list) => [
      ...names.map((name) =>
        number(list.reduce((sum, one) => sum + one[name === "targets" ? "target_tokens" : name], 0)),
      ),
      size(list.reduce((sum, one) => sum + one.stored_bytes, 0)),
    ];
    const rows = data.datasets.map((one) => ({
      cells: [make("span", { class: "path" }, one.prefix), ...counts([one])],
    }));
    rows.push({ cells: ["total", ...counts(data.datasets)], kind: "total" });
    section.append(make("article", {}, table(["dataset", ...names, ".bin"], rows)));
  }
  for (const dataset of data.datasets) {
    const charts = make("div", { class: "charts" });
    for (const [title, values] of dataset.histograms) charts.append(histogram(title, values));
    const kind = `${dataset.multimodal ? "multimodal" : "text"}, vocabulary of ${number(dataset.vocab_size)}`;
    section.append(
      make(
        "article",
        { class: "dataset" },
        make("h2", { class: "path" }, dataset.prefix),
        make("p", { class: "quiet" }, kind),
        facts(dataset),
        charts,
        sources(dataset),
      ),
    );
  }
}

// Documents.

// What is shown before a token's characters, or in their place. (Object keys are strings: ids find their names.)
function mark(id, piece) {
  if (id in data.special) return data.special[id];
  return piece === "" ? "·" : piece.includes("\n") ? "↵" : null;
}

function tokens(part) {
  const text = make("span", { class: "tokens" });
  part.ids.forEach((id, index) => {
    const role = ROLES[part.roles[index]];
    const token = make("span", { class: `token ${role}`, "data-hint": `id ${id} · ${MEANING[role]}` }, part.pieces[index]);
    if (id in data.special) token.classList.add("special");
    const shown = mark(id, part.pieces[index]);
    if (shown) token.setAttribute("data-mark", shown);
    text.append(token);
  });
  return text;
}

function picture(part) {
  const name = `${part.width} × ${part.height} ${part.form}`;
  const shown = part.problem
    ? make("p", { class: "broken" }, part.problem)
    : make("img", { src: data.images[part.image], alt: `image, ${name}`, loading: "lazy" });
  return make(
    "figure",
    { class: "picture-frame" },
    shown,
    make("figcaption", {}, [name, plural(part.size_bytes, "byte"), part.taken].filter(Boolean).join(" · ")),
  );
}

const body = (parts) => make("div", { class: "text" }, ...parts.map((part) => ("ids" in part ? tokens(part) : picture(part))));

function roleCounts(parts) {
  const counts = { t: 0, p: 0, n: 0 };
  for (const part of parts) for (const role of part.roles ?? "") counts[role] += 1;
  return counts;
}

function showDocuments() {
  const section = document.getElementById("documents");
  for (const document_ of data.documents) {
    const { t, p, n } = roleCounts(document_.parts);
    const images = document_.parts.filter((part) => !("ids" in part)).length;
    const shown = [
      `${plural(t, "target")}`,
      p && plural(p, "prompt token"),
      n && `${number(n)} never a target`,
      images && plural(images, "image"),
    ];
    const text = body(document_.parts);
    const card = make(
      "article",
      { class: "document", tabindex: "-1" },
      make("h2", { class: "path" }, document_.key),
      make("p", { class: "quiet" }, `document ${number(document_.number)} of ${document_.prefix}, from ${document_.source}`),
      make("p", { class: "quiet" }, shown.filter(Boolean).join(" · ")),
      text,
    );
    if (document_.left_tokens)
      card.append(
        make("p", { class: "quiet" }, `${number(document_.left_tokens)} more of ${number(document_.tokens)} tokens are not shown`),
      );
    section.append(card);
    if (text.scrollHeight > 420) clamp(card, text);
  }
}

function clamp(card, text) {
  const button = make("button", { type: "button", "aria-expanded": "false" }, "Show all");
  text.classList.add("clamped");
  button.addEventListener("click", () => {
    const whole = !text.classList.toggle("clamped");
    button.textContent = whole ? "Show less" : "Show all";
    button.setAttribute("aria-expanded", whole);
  });
  text.after(button);
}

// Packs.

// Neighbouring tokens of a text that are alike to the loss, as one run.
function runs(part) {
  if (!("ids" in part)) return [["picture", part.tokens]];
  const found = [];
  for (const letter of part.roles) {
    const role = ROLES[letter];
    if (found.length && found.at(-1)[0] === role) found.at(-1)[1] += 1;
    else found.push([role, 1]);
  }
  return found;
}

function stretch(element, amount) {
  element.style.flexGrow = amount;
  return element;
}

function bar(pack, padding) {
  const row = make("div", { class: "bar" });
  for (const piece of pack.pieces) {
    const block = stretch(make("div", { class: "piece" }), piece.stop - piece.start);
    for (const part of piece.parts)
      for (const [role, length] of runs(part)) {
        const as = part.taken ? `image, ${part.taken}` : `${plural(length, "token")}, ${MEANING[role]}`;
        const hint = `${piece.key}: ${as}`;
        block.append(stretch(make("div", { class: `run ${role}`, "data-hint": hint, "data-tokens": length }), length));
      }
    row.append(block);
  }
  if (padding)
    row.append(stretch(make("div", { class: "padding", "data-hint": plural(padding, "token") + " of padding" }), padding));
  return row;
}

function packed(piece) {
  const whole = piece.start === 0 && piece.stop === piece.document_tokens;
  const place = whole
    ? plural(piece.document_tokens, "token")
    : `tokens ${number(piece.start)} to ${number(piece.stop - 1)} of ${number(piece.document_tokens)}`;
  const text = body(piece.parts);
  if (piece.beyond) {
    const [id, shown] = piece.beyond;
    const hint = `id ${id} · learned by the last position, from behind the cut`;
    text.append(make("span", { class: "beyond", "data-hint": hint }, `→ ${shown || mark(id, shown)}`));
  }
  return make(
    "div",
    { class: "packed" },
    make("h3", { class: "path" }, piece.key),
    make("p", { class: "quiet" }, `${place}, document ${number(piece.document)} of ${piece.prefix}`),
    text,
  );
}

function showPacks() {
  const section = document.getElementById("packs");
  if (!data.packs.length) {
    section.remove();
    document.querySelector('nav a[href="#packs"]').remove();
    return;
  }
  const filled = (pack) => pack.pieces.reduce((sum, piece) => sum + piece.stop - piece.start, 0);
  for (const pack of data.packs) {
    const tokens_ = filled(pack), padding = pack.seq_len - tokens_;
    const images = pack.pieces.flatMap((piece) => piece.parts).filter((part) => !("ids" in part)).length;
    const title = `Step ${number(pack.step)} (${pack.kind}), pack ${pack.number}`;
    const words = [
      plural(pack.pieces.length, "document"),
      plural(images, "image"),
      pack.tiles > images && (pack.max_tiles ? `${pack.tiles} of ${plural(pack.max_tiles, "tile")}` : plural(pack.tiles, "tile")),
      `${number(tokens_)} of ${number(pack.seq_len)} tokens (${((100 * tokens_) / pack.seq_len).toFixed(1)} %)`,
      plural(pack.target_tokens, "target"),
    ];
    const card = make(
      "details",
      { class: "pack" },
      make("summary", {}, make("h2", { class: "inline" }, title), make("p", { class: "quiet" }, words.filter(Boolean).join(" · ")), bar(pack, padding)),
      ...pack.pieces.map(packed),
    );
    if (padding) card.append(make("div", { class: "packed padding" }, `${plural(padding, "token")} of padding`));
    section.append(card);
  }
  section.querySelector("details").open = true;
}

// The hint follows the pointer; a tap shows it, too.

const hint = document.getElementById("hint");
function point(event) {
  const target = event.target.closest?.("[data-hint]");
  hint.hidden = !target;
  if (!target) return;
  hint.textContent = target.getAttribute("data-hint");
  const box = hint.getBoundingClientRect();
  hint.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 4))}px`;
  hint.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
}
addEventListener("pointermove", point);
addEventListener("pointerdown", point);
addEventListener("scroll", () => (hint.hidden = true), { passive: true });

// The view, and the keys.

for (const name of ["borders", "mask"]) {
  const box = document.getElementById(name);
  box.addEventListener("change", () => document.body.classList.toggle(name, box.checked));
}

function go(direction) {
  const cards = [...document.querySelectorAll("article, details.pack")];
  const edge = parseFloat(getComputedStyle(document.documentElement).scrollPaddingTop) + 2;
  const tops = cards.map((card) => card.getBoundingClientRect().top);
  const index = direction > 0 ? tops.findIndex((top) => top > edge + 4) : tops.findLastIndex((top) => top < edge - 4);
  if (index < 0) return;
  cards[index].scrollIntoView();
  (cards[index].querySelector("summary") ?? cards[index]).focus({ preventScroll: true });
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "j") go(1);
  else if (event.key === "k") go(-1);
  else if (event.key === "b" || event.key === "m") document.getElementById(event.key === "b" ? "borders" : "mask").click();
});

document.title = data.datasets.map((dataset) => dataset.prefix).join(", ");
showStatistics();
showDocuments();
showPacks();
