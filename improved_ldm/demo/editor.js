// The view lives in `props.value`, in pixels of the original image. `change` alone writes it, `show` alone shows it.
// What is shown stands in values and on the canvas: Gradio resets texts and attributes when a property changes.
const NUMBERS = ["top", "left", "height", "width"];
const MARGIN = 15; // canvas pixels around the image, so that a handle on its edge is whole
const HANDLE = 9; // half the side of a handle, canvas pixels
const REACH = 26; // how near a handle a pointer takes it, canvas pixels

const input = (name) => element.querySelector(`[name=${name}]`);
const choices = element.querySelectorAll("[data-choice]"); // a checkbox for a switch, a list of labels for the others
const valueOf = (choice) => (choice.type === "checkbox" ? "checked" : "value");
const canvas = element.querySelector("canvas");
const context = canvas.getContext("2d");
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function change(part) {
  const view = { ...props.value, ...part };
  const side = view.original_size;
  view.height = clamp(view.height, 1, side);
  view.width = clamp(view.width, 1, side);
  view.top = clamp(view.top, 0, side - view.height);
  view.left = clamp(view.left, 0, side - view.width);
  props.value = view;
  show();
}

function resize(side) {
  // The same part of an image of another size.
  side = clamp(side, 1, props.side);
  const ratio = side / props.value.original_size;
  change({ original_size: side, ...Object.fromEntries(NUMBERS.map((name) => [name, props.value[name] * ratio])) });
}

function show() {
  const view = props.value;
  for (const choice of choices) choice[valueOf(choice)] = view[choice.name];
  input("original_size").value = view.original_size;
  input("side").value = view.original_size;
  for (const name of NUMBERS) input(name).value = Math.round(view[name] * 10) / 10;
  draw(view);
}

const scale = () => (canvas.width - 2 * MARGIN) / props.value.original_size; // canvas pixels an image pixel

function corners({ top, left, height, width }) {
  return [[left, top], [left + width, top], [left, top + height], [left + width, top + height]];
}

function draw(view) {
  const side = MARGIN + view.original_size * scale();
  const points = corners(view).map((point) => point.map((value) => MARGIN + value * scale()));
  const [[x, y], , , [right, bottom]] = points;
  const accent = getComputedStyle(canvas).color;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "rgb(15 23 42 / 62%)";
  context.fillRect(MARGIN, MARGIN, side - MARGIN, side - MARGIN);
  context.clearRect(x, y, right - x, bottom - y);
  context.lineWidth = 4;
  context.strokeStyle = accent;
  context.strokeRect(x, y, right - x, bottom - y);
  context.fillStyle = "white";
  for (const [cornerX, cornerY] of points) {
    context.beginPath();
    context.rect(cornerX - HANDLE, cornerY - HANDLE, 2 * HANDLE, 2 * HANDLE);
    context.fill();
    context.stroke();
  }
}

function pointOf(event) {
  const box = canvas.getBoundingClientRect();
  const zoom = canvas.width / box.width;
  return [event.clientX - box.left, event.clientY - box.top].map((value) => (value * zoom - MARGIN) / scale());
}

function between(one, other) {
  // The rectangle on whole pixels that has two points as opposite corners.
  const [x0, y0, x1, y1] = [...one, ...other].map((value) => clamp(Math.round(value), 0, props.value.original_size));
  return { top: Math.min(y0, y1), left: Math.min(x0, x1), height: Math.abs(y1 - y0), width: Math.abs(x1 - x0) };
}

function gripAt(start) {
  // What a pointer takes hold of: its cursor, and what moving it to a point makes of the view.
  const view = props.value;
  const all = corners(view);
  const near = all.findIndex(([x, y]) => Math.hypot(x - start[0], y - start[1]) * scale() < REACH);
  if (near >= 0) {
    return { cursor: near % 3 ? "nesw-resize" : "nwse-resize", moved: (point) => between(all[3 - near], point) };
  }
  const [x, y] = [start[0] - view.left, start[1] - view.top];
  const isInside = x > 0 && y > 0 && x < view.width && y < view.height;
  const isWhole = Math.min(view.height, view.width) === view.original_size;
  if (isInside && !isWhole) {
    return { cursor: "move", moved: (point) => ({ left: Math.round(point[0] - x), top: Math.round(point[1] - y) }) };
  }
  return { cursor: "crosshair", moved: (point) => between(start, point) };
}

let grip = null;
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  grip = gripAt(pointOf(event));
});
canvas.addEventListener("pointermove", (event) => {
  const point = pointOf(event);
  canvas.style.cursor = (grip ?? gripAt(point)).cursor;
  if (grip) change(grip.moved(point));
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (grip = null));

function onTyped(name, use) {
  input(name).addEventListener("change", ({ target }) => (target.value === "" ? show() : use(target.valueAsNumber)));
}

for (const name of NUMBERS) onTyped(name, (value) => change({ [name]: value }));
onTyped("side", resize);
for (const choice of choices) {
  choice.addEventListener("change", () => change({ [choice.name]: choice[valueOf(choice)] }));
}
input("original_size").addEventListener("input", ({ target }) => resize(target.valueAsNumber));
input("whole").addEventListener("click", () => change({ top: 0, left: 0, height: Infinity, width: Infinity }));
watch("value", show);
show();
