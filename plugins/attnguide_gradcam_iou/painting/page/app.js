// The page: tools, history, saving, and requests to the server.
const $ = (id) => document.getElementById(id);
const on = (id, type, action) => $(id).addEventListener(type, action);
// The token leaves the address bar, and stays for a reload of this tab only.
const given = new URLSearchParams(location.search).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", "/");
}
const token = given || sessionStorage.getItem("token") || "";

async function ask(path, options = {}) {
  const response = await fetch(path, {...options, headers: {"X-Token": token, ...options.headers}});
  if (response.ok) return response;
  let text = `${response.status} ${response.statusText}`;
  if ((response.headers.get("content-type") || "").includes("json")) text = (await response.json()).error || text;
  throw Object.assign(new Error(text), {status: response.status});
}
const askJson = async (path, options) => (await ask(path, options)).json();

// -------------------------------------------------------------------------- state

const view = new View($("canvas"));
let state, sheet = 0, about = null, cls = 0, mask = null, tool = "brush";
let stroke = null;   // the shape being drawn: {tool, points, before}
const subtracts = (event) => Boolean(event && event.altKey) !== $("subtract").checked;

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
  clearTimeout(complain.timer);
  if (text) complain.timer = setTimeout(() => complain(""), 8000);
}
function announce(text) { $("announce").textContent = text; }
function guarded(action) {
  return async (...values) => {
    try { await action(...values); } catch (error) { complain(error.message); }
  };
}

// ------------------------------------------------------------------------ saving

// The newest state of each mask is sent, one after the other. A mask that did not reach the server is sent again after
// the others; one that the server refuses is reported.
const saver = {
  waiting: new Map(), busy: false, failed: "",
  get pending() { return this.busy || this.waiting.size > 0; },
  keep(number, kind, bits) { this.waiting.set(`${number}/${kind}`, bits); this.show(); this.run(); },
  async run() {
    if (this.busy) return;
    this.busy = true;
    while (this.waiting.size) {
      const [key, bits] = this.waiting.entries().next().value;
      try {
        const progress = await askJson(`/api/mask/${key}`, {method: "PUT", body: bits});
        if (this.waiting.get(key) === bits) this.waiting.delete(key);
        noteProgress(Number(key.split("/")[0]), progress);
        this.failed = "";
      } catch (error) {
        if (this.failed !== error.message) complain(`Not saved: ${error.message}`);
        this.failed = error.message;
        const newest = this.waiting.get(key);
        this.waiting.delete(key);
        const refused = error.status >= 400 && error.status < 500;
        if (newest !== bits || !refused) this.waiting.set(key, newest);
        this.show();
        if (!refused) await new Promise((done) => setTimeout(done, 1500));
      }
    }
    this.busy = false;
    this.show();
  },
  async idle() { while (this.pending) await new Promise((done) => setTimeout(done, 20)); },
  show() {
    $("saved").className = this.failed ? "bad" : this.pending ? "busy" : "";
    $("saved").textContent = this.failed ? "Not saved" : this.pending ? "Saving …" : "Saved";
  },
};
addEventListener("beforeunload", (event) => { if (saver.pending) event.preventDefault(); });

function noteProgress(number, {painted, done}) {
  state.done = done;
  if (number === sheet && about) about.painted = painted;
  showProgress();
}

function showProgress() {
  if (!about) return;
  const total = state.template ? state.classes.length : state.sheets;
  const done = state.template ? about.painted.length : state.done;
  $("done").textContent = state.template ? `${done} of ${total} classes` : `${done} of ${total} painted`;
  document.querySelectorAll("#classes label").forEach((label, index) => {
    label.classList.toggle("painted", about.painted.includes(index));
  });
}

// ----------------------------------------------------------------------- history

// The state of a mask before each change, packed; for the masks that were changed last.
const histories = new Map();
function undoSteps() {
  const key = `${sheet}/${cls}`, past = histories.get(key) || {undo: [], redo: []};
  histories.delete(key);
  histories.set(key, past);
  if (histories.size > 12) histories.delete(histories.keys().next().value);
  return past;
}

function changed(before) {
  const now = Raster.pack(mask);
  if (before.length === now.length && before.every((byte, place) => byte === now[place])) return;
  const past = undoSteps();
  past.undo.push(before);
  if (past.undo.length > 100) past.undo.shift();
  past.redo = [];
  saver.keep(sheet, cls, now);
  shown();
}

function step(from, to) {
  const past = undoSteps();
  if (stroke || !mask || !past[from].length) return;
  past[to].push(Raster.pack(mask));
  const bits = past[from].pop();
  mask = Raster.unpack(bits, mask.length);
  saver.keep(sheet, cls, bits);
  view.paint(mask);
  shown();
  announce(from);
}

function shown() {
  const past = undoSteps();
  $("undo").disabled = !past.undo.length;
  $("redo").disabled = !past.redo.length;
  const inside = mask.reduce((sum, value) => sum + value, 0);
  $("clear").disabled = !inside;
  $("share").replaceChildren(bold(`${(100 * inside / mask.length).toFixed(1)} %`), " of the image");
  showOverlap();
}

function make(tag, values, ...children) {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...children);
  return element;
}
const bold = (text) => make("b", {}, text);

function change(action) {
  if (!mask || stroke) return;
  const before = Raster.pack(mask);
  action();
  view.paint(mask);
  changed(before);
}

// ------------------------------------------------------------------ images, classes

const pictures = new Map();  // the current image and its neighbours
async function picture(number) {
  if (!pictures.has(number)) {
    const loading = ask(`/api/image/${number}`).then((response) => response.blob()).then((blob) => createImageBitmap(blob));
    pictures.set(number, loading);
    loading.catch(() => pictures.delete(number));
    for (const other of pictures.keys()) if (Math.abs(other - number) > 1) pictures.delete(other);
  }
  return pictures.get(number);
}

// The sheet and class that are being loaded; nothing can be painted until they are there.
let visit = 0, target = 0, wanted = 0;

async function visitSheet(number, index) {
  if (stroke) endStroke(false);
  const own = ++visit;
  target = Math.min(state.sheets - 1, Math.max(0, number));
  wanted = index;
  mask = null;
  view.forget();
  $("pair").hidden = true;
  $("number").value = target + 1;
  $("previous").disabled = target === 0;
  $("next").disabled = target === state.sheets - 1;
  const input = document.querySelector(`#classes input[value="${wanted}"]`);
  if (input) input.checked = true;
  let info, image, bits;
  try {
    const key = `${target}/${wanted}`;
    [info, image] = await Promise.all([askJson(`/api/sheet/${target}`), picture(target)]);
    bits = saver.waiting.get(key);
    if (!bits) {
      const response = await ask(`/api/mask/${key}`);
      bits = response.status === 204 ? new Uint8Array(0) : new Uint8Array(await response.arrayBuffer());
      bits = saver.waiting.get(key) || bits;
    }
  } catch (error) {
    // An image that cannot be read is skipped.
    if (own !== visit) return;
    [sheet, cls, about, view.image] = [target, wanted, null, null];
    view.draw();
    $("name").textContent = "–";
    throw error;
  }
  if (own !== visit) return;  // another one was chosen in the meantime
  if (sheet !== target || view.image !== image) view.show(image);
  [sheet, cls, about] = [target, wanted, info];
  mask = Raster.unpack(bits, info.width * info.height);
  view.cross = null;
  $("name").textContent = `${info.name} · ${info.width} × ${info.height}`;
  if (!sized) startSize();
  view.paint(mask);
  showProgress();
  shown();
  showHeat();
  if (!$("which").hidden) guarded(showPair)();
  if (sheet + 1 < state.sheets) picture(sheet + 1).catch(() => {});
}
const go = guarded((number) => visitSheet(number, wanted));
const choose = guarded((index) => visitSheet(target, index));

// The brush begins with a size that suits the first image.
let sized = false;
function startSize() {
  sized = true;
  const side = Math.max(about.width, about.height);
  $("size").max = Math.max(8, Math.round(side / 2));
  $("size").value = Math.max(1, Math.round(side / 14));
  showSize();
}

async function nextToPaint() {
  const {sheet: next} = await askJson(`/api/next/${target}`);
  if (next === null) announce("all images are painted");
  else await go(next);
}

function listClasses() {
  if (!state.classes.length) { $("classbox").hidden = true; return; }
  state.classes.forEach((name, index) => {
    const input = make("input", {type: "radio", name: "class", value: String(index)});
    input.addEventListener("change", () => choose(index));
    $("classes").append(make("label", {}, input, make("i"), bold(name), ...index < 9 ? [make("kbd", {}, index + 1)] : []));
  });
  $("filter").hidden = state.classes.length <= 12;
  on("filter", "input", () => {
    const text = $("filter").value.toLowerCase();
    document.querySelectorAll("#classes label").forEach((label) => {
      label.hidden = !label.querySelector("b").textContent.toLowerCase().includes(text);
    });
  });
}

// -------------------------------------------------------------------------- drawing

const TOOLS = {
  brush: ["B", "Brush", "M4 20c3 0 4-1 4-3a2.5 2.5 0 1 1 5 0c0 3-4 4-9 3zM12 14l8-10"],
  eraser: ["E", "Eraser", "M8 20h12M5 14l8-9 6 6-8 9H8l-3-3z"],
  polygon: ["P", "Polygon", "M12 3l8 6-3 11H7L4 9z"],
  rectangle: ["R", "Rectangle", "M4 6h16v12H4z"],
  ellipse: ["O", "Ellipse", "M12 5c5 0 9 3 9 7s-4 7-9 7-9-3-9-7 4-7 9-7z"],
  fill: ["F", "Fill", "M5 11l7-7 7 7-7 7zM19 15c1.500 2 2 3 2 4a2 2 0 0 1-4 0c0-1 .5-2 2-4z"],
  hand: ["H", "Move the image", "M7 12V6a1.500 1.500 0 0 1 3 0v5V4.500a1.500 1.500 0 0 1 3 0V11V6a1.500 1.500 0 0 1 3 0v6-3a1.500 1.500 0 0 1 3 0v5c0 4-2 7-6 7-3 0-4-1-6-4l-3-4c1-1.500 2-1 3 1z"],
};

function pick(name) {
  if (stroke) endStroke(false);
  tool = name;
  view.cross = null;
  document.querySelectorAll("#tools button").forEach((button) => {
    button.setAttribute("aria-pressed", button.dataset.tool === name);
  });
  $("canvas").style.cursor = name === "hand" ? "grab" : "crosshair";
  view.draw();
}

function listTools() {
  for (const [name, [key, title, path]] of Object.entries(TOOLS)) {
    const button = make("button", {title: `${title} (${key})`, ariaLabel: title});
    button.dataset.tool = name;
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const shape = document.createElementNS("http://www.w3.org/2000/svg", "path");
    svg.setAttribute("viewBox", "0 0 24 24");
    svg.setAttribute("aria-hidden", "true");
    shape.setAttribute("d", path);
    svg.append(shape);
    button.append(svg);
    button.addEventListener("click", () => pick(name));
    $("tools").append(button);
  }
}

const radius = () => Number($("size").value) / 2;
const draws = (name) => name === "brush" || name === "eraser";

function begin(point, event) {
  if (!mask) return;
  const before = Raster.pack(mask);
  if (tool === "fill") {
    Raster.fill(mask, about.width, about.height, point, subtracts(event) ? 0 : 1);
    view.paint(mask);
    changed(before);
    return;
  }
  stroke = {tool, points: [point], start: point, byKeys: Boolean(view.cross), before, value: tool === "eraser" || (!draws(tool) && subtracts(event)) ? 0 : 1};
  if (draws(tool)) extend(point);
}

function extend(point, event) {
  if (!stroke) return;
  if (draws(stroke.tool)) {
    const last = stroke.points[stroke.points.length - 1];
    const part = Raster.stroke(mask, about.width, about.height, last, point, radius(), stroke.value);
    stroke.points = [point];
    view.paint(mask, part);
    return;
  }
  if (stroke.tool === "polygon") { stroke.loose = point; view.draw(); return; }
  const from = stroke.start;
  if (stroke.byKeys) {
    // From edge to edge of the pixels that the cross stood on.
    stroke.points = [
      {x: Math.min(from.x, point.x) - 0.5, y: Math.min(from.y, point.y) - 0.5},
      {x: Math.max(from.x, point.x) + 0.5, y: Math.max(from.y, point.y) + 0.5},
    ];
    view.draw();
    return;
  }
  if (event && event.shiftKey) {
    const side = Math.max(Math.abs(point.x - from.x), Math.abs(point.y - from.y));
    point = {x: from.x + side * Math.sign(point.x - from.x), y: from.y + side * Math.sign(point.y - from.y)};
  }
  stroke.points[1] = point;
  view.draw();
}

// Ends the shape being drawn, and keeps or discards it.
function endStroke(kept = true) {
  if (!stroke) return;
  const {tool: kind, points, before, value} = stroke;
  stroke = null;
  if (!kept) mask = Raster.unpack(before, mask.length);
  else if (kind === "polygon" && points.length > 2) Raster.polygon(mask, about.width, about.height, points, value);
  else if (!draws(kind) && kind !== "polygon" && points.length === 2) {
    Raster[kind](mask, about.width, about.height, points[0], points[1], value);
  }
  view.paint(mask);
  changed(before);
}

// Adds a corner to a polygon; at its first corner, closes it.
function corner(point, event) {
  if (!stroke) { begin(point, event); view.draw(); return; }
  const [first] = stroke.points;
  const close = Math.hypot(point.x - first.x, point.y - first.y) * view.scale < 9;
  if (close && stroke.points.length > 2) endStroke();
  else stroke.points.push(point);
  view.draw();
}

view.sketch = (context, scale) => {
  const twice = (path) => {  // visible on light and dark
    for (const [color, width] of [["#000c", 3], ["#fff", 1.3]]) {
      context.strokeStyle = color;
      context.lineWidth = width / scale;
      path();
      context.stroke();
    }
  };
  if (stroke && !draws(stroke.tool)) {
    const [a, b] = stroke.points;
    twice(() => {
      context.beginPath();
      if (stroke.tool === "polygon") {
        stroke.points.forEach((p) => context.lineTo(p.x, p.y));
        if (stroke.loose) context.lineTo(stroke.loose.x, stroke.loose.y);
      } else if (b && stroke.tool === "rectangle") context.rect(a.x, a.y, b.x - a.x, b.y - a.y);
      else if (b) {
        context.ellipse((a.x + b.x) / 2, (a.y + b.y) / 2, Math.abs(a.x - b.x) / 2, Math.abs(a.y - b.y) / 2, 0, 0, 7);
      }
    });
    if (stroke.tool === "polygon") {
      for (const p of stroke.points) {
        context.fillStyle = "#fff";
        context.fillRect(p.x - 2.5 / scale, p.y - 2.5 / scale, 5 / scale, 5 / scale);
      }
    }
  }
  const at = view.cross || view.pointer;
  if (at && draws(tool)) {
    twice(() => { context.beginPath(); context.arc(at.x, at.y, Math.max(radius(), 0.5), 0, 7); });
  }
  if (view.cross) {
    const {x, y} = view.cross, arm = 9 / scale;
    twice(() => {
      context.beginPath();
      context.moveTo(x - arm, y); context.lineTo(x + arm, y);
      context.moveTo(x, y - arm); context.lineTo(x, y + arm);
    });
  }
};

// ------------------------------------------------------------------ pointers and wheel

const fingers = new Map();
// The pointer that draws, the action of a finger if no second one follows, and the event that moves the image.
let drawing = null, tap = null, panning = null, pinch = null;

on("canvas", "pointerdown", (event) => {
  if (!about) return;
  const touches = event.pointerType === "touch";
  if (drawing !== null && !(touches && fingers.has(drawing))) return;  // a palm next to a pen, a second button
  $("canvas").focus({preventScroll: true});
  view.cross = null;
  $("canvas").setPointerCapture(event.pointerId);
  if (touches) {
    fingers.set(event.pointerId, event);
    if (fingers.size > 2) return;
    if (fingers.size === 2) {
      if (drawing !== null && tool !== "polygon") endStroke(false);
      drawing = tap = panning = null;
      pinch = spread();
      return;
    }
  }
  if (event.button === 1 || tool === "hand") { panning = event; event.preventDefault(); return; }
  if (event.button !== 0) return;
  drawing = event.pointerId;
  const point = view.toImage(event.clientX, event.clientY);
  const act = () => { if (tool === "polygon") corner(point, event); else begin(point, event); };
  if (touches && (tool === "polygon" || tool === "fill")) tap = act;
  else act();
});

on("canvas", "pointermove", (event) => {
  if (!about) return;
  if (fingers.has(event.pointerId)) fingers.set(event.pointerId, event);
  if (pinch) {
    if (fingers.size !== 2) return;
    const now = spread(), frame = $("canvas").getBoundingClientRect();
    view.zoom(now.apart / pinch.apart, now.x - frame.left, now.y - frame.top);
    view.pan(now.x - pinch.x, now.y - pinch.y);
    pinch = now;
    return;
  }
  if (panning) {
    if (event.pointerId !== panning.pointerId) return;
    view.pan(event.clientX - panning.clientX, event.clientY - panning.clientY);
    panning = event;
    return;
  }
  if (drawing !== null && event.pointerId !== drawing) return;
  view.pointer = event.pointerType === "touch" ? null : view.toImage(event.clientX, event.clientY);
  if (!stroke || stroke.byKeys) { view.draw(); return; }
  // All places since the last event, so that a quick stroke is round.
  const events = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  for (const {clientX, clientY} of events.length ? events : [event]) extend(view.toImage(clientX, clientY), event);
});

function lift(event) {
  fingers.delete(event.pointerId);
  if (pinch) { if (!fingers.size) pinch = null; return; }
  if (panning && panning.pointerId === event.pointerId) panning = null;
  if (drawing !== event.pointerId) return;
  drawing = null;
  if (tap && event.type === "pointerup") tap();
  tap = null;
  if (stroke && stroke.tool !== "polygon") endStroke();
}
for (const type of ["pointerup", "pointercancel"]) on("canvas", type, lift);
on("canvas", "pointerleave", () => { view.pointer = null; view.draw(); });
on("canvas", "dblclick", () => { if (stroke && stroke.tool === "polygon") endStroke(); });
on("canvas", "contextmenu", (event) => event.preventDefault());
on("canvas", "wheel", (event) => {
  event.preventDefault();
  const frame = $("canvas").getBoundingClientRect();
  view.zoom(Math.exp(-event.deltaY / (event.deltaMode ? 20 : 400)), event.clientX - frame.left, event.clientY - frame.top);
}, {passive: false});

function spread() {
  const [a, b] = [...fingers.values()];
  return {
    x: (a.clientX + b.clientX) / 2, y: (a.clientY + b.clientY) / 2,
    apart: Math.max(1, Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY)),
  };
}

// ---------------------------------------------------------------------------- keys

const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

// On the image the cross stands at the middle of a pixel; for polygons, at its corner.
const offset = () => tool === "polygon" ? 0 : 0.5;
const middle = () => ({x: Math.floor(about.width / 2) + offset(), y: Math.floor(about.height / 2) + offset()});
on("canvas", "keydown", (event) => {
  if (!about || event.ctrlKey || event.metaKey) return;
  const arrow = ARROWS[event.key];
  if (arrow) {
    event.preventDefault();
    const pace = event.shiftKey ? 10 : 1, edge = offset();
    view.cross = view.cross ? {
      x: Math.min(about.width - edge, Math.max(edge, view.cross.x + pace * arrow[0])),
      y: Math.min(about.height - edge, Math.max(edge, view.cross.y + pace * arrow[1])),
    } : middle();
    if (stroke) extend(view.cross, null);
    view.draw();
    announce(`${Math.floor(view.cross.x)}, ${Math.floor(view.cross.y)}`);
  } else if (event.key === " ") {
    event.preventDefault();
    if (event.repeat || tool === "hand") return;
    if (!view.cross) view.cross = middle();
    if (tool === "polygon") corner(view.cross, event);
    else if (stroke && !draws(tool)) { extend(view.cross, event); endStroke(); }
    else begin(view.cross, event);
    view.draw();
  }
});
on("canvas", "keyup", (event) => {
  if (event.key === " " && stroke && draws(stroke.tool)) endStroke();
});

addEventListener("keydown", (event) => {
  const typing = event.target.matches("input[type=number], input[type=search]");
  if (typing || !state || $("keys").open) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if ((event.ctrlKey || event.metaKey) && (key === "z" || key === "y")) {
    event.preventDefault();
    if (key === "y" || event.shiftKey) step("redo", "undo");
    else step("undo", "redo");
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const named = Object.keys(TOOLS).find((name) => TOOLS[name][0].toLowerCase() === key);
  const doing = {
    "[": () => resize(-1), "]": () => resize(1), Delete: () => $("clear").click(), i: () => $("invert").click(),
    PageUp: () => go(target - 1), PageDown: () => go(target + 1), n: guarded(nextToPaint),
    "+": () => view.zoom(1.25), "=": () => view.zoom(1.25), "-": () => view.zoom(0.8), 0: () => view.fit(),
    m: () => $("heat").click(), "?": () => $("keys").showModal(),
    Enter: () => { if (stroke && stroke.tool === "polygon") endStroke(); },
    Escape: () => endStroke(false),
    Backspace: () => { if (stroke && stroke.tool === "polygon" && stroke.points.length > 1) stroke.points.pop(); view.draw(); },
  }[key];
  if (key === "Enter" && !(stroke && stroke.tool === "polygon")) return;  // buttons want it
  if (named) pick(named);
  else if (doing) doing();
  else if (/^[1-9]$/.test(key) && Number(key) <= state.classes.length) choose(Number(key) - 1);
  else return;
  event.preventDefault();
});

function resize(direction) {
  const size = Number($("size").value);
  $("size").value = size + direction * Math.max(1, Math.round(size / 8));
  showSize();
}
function showSize() { $("sizetext").textContent = `${$("size").value} px`; view.draw(); }

// -------------------------------------------------------------------------- the model

const maps = new Map();
const which = () => document.querySelector("input[name=which]:checked").value;

async function seenMap(number, index, model) {
  const key = `${number}/${index}/${model}`;
  if (!maps.has(key)) {
    const loading = askJson(`/api/map/${key}`);
    maps.set(key, loading);
    loading.catch(() => maps.delete(key));
    if (maps.size > 64) maps.delete(maps.keys().next().value);
  }
  return maps.get(key);
}

let look = 0;
const showHeat = guarded(async () => {
  const own = ++look, there = about && state.seen[cls];
  $("seen").hidden = !there;
  view.values = view.heat = null;
  view.draw();
  if (!there) return;
  $("overlap").textContent = "computing …";
  let map;
  try {
    map = await seenMap(sheet, cls, which());
  } catch (error) {
    if (own === look) $("overlap").textContent = "";
    throw error;
  }
  if (own !== look) return;
  [view.values, view.box] = [map, map.box];
  view.heat = $("heat").checked ? heatImage(map.values) : null;
  view.draw();
  showOverlap();
});

// The share of the map that lies in the mask.
function showOverlap() {
  if (!view.values || !mask) return;
  const {values, box: [left, top, right, bottom], score} = view.values;
  const rows = values.length, columns = values[0].length;
  let inside = 0, all = 0;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const x0 = Math.max(0, Math.floor(left + (right - left) * column / columns));
      const x1 = Math.min(about.width, Math.ceil(left + (right - left) * (column + 1) / columns));
      const y0 = Math.max(0, Math.floor(top + (bottom - top) * row / rows));
      const y1 = Math.min(about.height, Math.ceil(top + (bottom - top) * (row + 1) / rows));
      let covered = 0;
      for (let y = y0; y < y1; y++) for (let x = x0; x < x1; x++) covered += mask[y * about.width + x];
      const area = Math.max(0, x1 - x0) * Math.max(0, y1 - y0);
      all += values[row][column];
      if (area) inside += values[row][column] * covered / area;
    }
  }
  const share = all ? `${(100 * inside / all).toFixed(0)} %` : "nothing";
  $("overlap").replaceChildren(bold(share), " of the map lies in the mask · probability ", bold(score.toFixed(2)));
}

function listParts() {
  $("partbox").hidden = !state.parts.length;
  state.parts.forEach((name, index) => {
    const text = name.replaceAll("_", " "), button = make("button", {title: `Add the ${text} to the mask`}, text);
    button.addEventListener("click", guarded(async () => {
      const own = visit, bytes = new Uint8Array(await (await ask(`/api/part/${sheet}/${index}`)).arrayBuffer());
      if (own !== visit || !mask) return;
      const part = Raster.unpack(bytes, mask.length);
      change(() => part.forEach((value, place) => { if (value) mask[place] = $("subtract").checked ? 0 : 1; }));
    }));
    $("parts").append(button);
  });
}

// ---------------------------------------------------------------------- fine-tuning

const percent = (value) => typeof value === "number" ? `${(100 * value).toFixed(1)} %` : "–";
const short = (value) => typeof value === "number" ? value.toFixed(3) : "–";

async function watch() {
  const status = await askJson("/api/tuning");
  const running = status.state === "running";
  $("tune").hidden = running;
  $("stop").hidden = !running;
  $("progress").hidden = !running;
  if (status.steps) $("progress").value = status.step / status.steps;
  const file = `${status.file.split(/[\\/]/).pop()}, in the folder of the masks.`;
  const texts = {
    running: status.steps ? `batch ${status.step} of ${status.steps}` : "reading the images …",
    done: `Done. Weights: ${file}`, stopped: `Stopped. Weights: ${file}`, failed: status.error, idle: "",
  };
  $("tuned").textContent = texts[status.state];
  $("tuned").title = status.file;
  $("epochtable").hidden = !status.epochs.length;
  $("epochtable").tBodies[0].replaceChildren(...status.epochs.map((epoch) => {
    const row = document.createElement("tr"), losses = [short(epoch.attribute_loss), short(epoch.guidance_loss)];
    for (const text of [epoch.number || "before", ...losses, percent(epoch.accuracy), short(epoch.iou)]) {
      row.insertCell().textContent = text;
    }
    return row;
  }));
  if (running) setTimeout(guarded(watch), 500);
  else if (status.maps.includes("after")) await compare();
}

async function compare() {
  for (const key of [...maps.keys()]) if (key.endsWith("/after")) maps.delete(key);
  $("which").hidden = false;
  document.querySelector("input[name=which][value=after]").checked = true;
  await showHeat();
  await showPair();
}

// The maps of both models side by side.
async function showPair() {
  const own = visit, image = view.image;
  if (!image || !state.seen[cls]) return;
  for (const model of ["before", "after"]) {
    const {values, box} = await seenMap(sheet, cls, model), canvas = $(model);
    if (own !== visit) return;
    const context = canvas.getContext("2d"), scale = canvas.width / Math.max(image.width, image.height);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.setTransform(scale, 0, 0, scale, (canvas.width - scale * image.width) / 2, (canvas.height - scale * image.height) / 2);
    context.drawImage(image, 0, 0);
    context.globalAlpha = 0.75;
    drawHeat(context, heatImage(values), box);
    context.globalAlpha = 1;
  }
  $("pair").hidden = false;
}

// --------------------------------------------------------------------------- files

async function download(path) {
  const response = await ask(path), href = URL.createObjectURL(await response.blob());
  const link = make("a", {href, download: JSON.parse(response.headers.get("x-filename"))});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ------------------------------------------------------------------------ the buttons

const CLICKS = {
  previous: () => go(target - 1), next: () => go(target + 1), todo: guarded(nextToPaint),
  undo: () => step("undo", "redo"), redo: () => step("redo", "undo"), clear: () => change(() => mask.fill(0)),
  invert: () => change(() => mask.forEach((value, place) => { mask[place] = 1 - value; })),
  in: () => view.zoom(1.25), out: () => view.zoom(0.8), fit: () => view.fit(), help: () => $("keys").showModal(),
  labelme: guarded(() => download(`/api/labelme/${sheet}`)), coco: guarded(() => download("/api/coco")),
  stop: guarded(() => askJson("/api/tuning", {method: "DELETE"})),
};
for (const [id, action] of Object.entries(CLICKS)) on(id, "click", action);
on("number", "change", () => go(Number($("number").value) - 1));
on("size", "input", showSize);
on("heat", "change", () => showHeat());
document.querySelectorAll("input[name=which]").forEach((input) => input.addEventListener("change", () => showHeat()));
for (const [slider, text, name] of [["opacity", "opacitytext", "maskOpacity"], ["heatopacity", "heattext", "heatOpacity"]]) {
  const show = () => {
    view[name] = Number($(slider).value) / 100;
    $(text).textContent = `${$(slider).value} %`;
    view.draw();
  };
  $(slider).addEventListener("input", show);
  show();
}
on("import", "change", guarded(async () => {
  const [file] = $("import").files;
  if (!file) return;
  $("import").value = "";
  const number = target;
  if (stroke) endStroke(false);
  mask = null;  // nothing can be painted meanwhile
  view.forget();
  let imported;
  try {
    await saver.idle();
    imported = await askJson(`/api/import/${number}`, {method: "POST", body: file});
    histories.clear();
    noteProgress(number, imported);
  } finally {
    await go(target);
  }
  const skipped = imported.skipped.length ? ` Skipped: ${imported.skipped.join("; ")}.` : "";
  announce(`${imported.masks} masks imported.${skipped}`);
  if (skipped) complain(`${imported.masks} masks imported.${skipped}`);
}));
on("tune", "click", guarded(async () => {
  const settings = {
    epochs: Number($("epochs").value), weight: Number($("weight").value), learning_rate: Number($("rate").value),
  };
  $("pair").hidden = true;
  const headers = {"Content-Type": "application/json"};
  await askJson("/api/tuning", {method: "POST", body: JSON.stringify(settings), headers});
  await watch();
}));
view.onmove = () => { $("fit").textContent = `${Math.round(100 * view.scale)} %`; };

guarded(async () => {
  state = await askJson("/api/state");
  listClasses();
  listTools();
  listParts();
  pick("brush");
  $("walk").hidden = state.template || state.sheets === 1;
  $("number").max = state.sheets;
  $("of").textContent = `of ${state.sheets}`;
  $("folder").textContent = `Masks: ${state.folder}`;
  $("tuning").hidden = !state.tuning;
  $("hint").hidden = state.tuning;
  $("hint").textContent = state.seen.some(Boolean)
    ? "Start with --data FOLDER, images in a subfolder for each class, to fine-tune the model here."
    : "Start with --model or --checkpoint to see where a model looks while you paint.";
  document.title = `attnguide annotate · ${state.folder}`;
  await go(state.first);
  if (state.tuning) guarded(watch)();
  document.body.dataset.ready = "true";
})();
