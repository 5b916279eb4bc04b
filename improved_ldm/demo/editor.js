// The view lives in `props.value`, in pixels of the original image. `change` alone writes it, `show` alone shows it.
// What is shown stands in values and on the canvas: Gradio resets texts and attributes when a property changes.
const NUMBERS = ["top", "left", "height", "width"];
const MARGIN = 15; // canvas pixels around the image, so that a handle on its edge is whole
const CANVAS = 600; // longer side of the canvas, canvas pixels
const HANDLE = 9; // half the side of a handle, canvas pixels
const REACH = 26; // how near a handle a pointer takes it, canvas pixels

const input = (name) => element.querySelector(`[name=${name}]`);
const choices = element.querySelectorAll("[data-choice]"); // a checkbox for a switch, a list of labels for the others
const valueOf = (choice) => (choice.type === "checkbox" ? "checked" : "value");
const canvas = input("crop");
const context = canvas.getContext("2d");
const stage = element.querySelector(".stage");
const shapeCanvas = input("shape");
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

const shapeOf = (view) => props.shapes.findIndex(([label]) => label === view.shape); // its place in the list

function imageOf(view) {
  // The sides of the image in its pixels: the shorter one is asked for, and its aspect ratio is that of the shape.
  const [, , height, width] = props.shapes[shapeOf(view)];
  const shorter = Math.min(height, width);
  return { height: (view.original_size * height) / shorter, width: (view.original_size * width) / shorter };
}

function change(part) {
  const view = { ...props.value, ...part };
  const image = imageOf(view);
  view.height = clamp(view.height, 1, image.height);
  view.width = clamp(view.width, 1, image.width);
  view.top = clamp(view.top, 0, image.height - view.height);
  view.left = clamp(view.left, 0, image.width - view.width);
  props.value = view;
  show();
}

function recast(part) {
  // The same part of an image of another size or shape.
  const [before, after] = [props.value, { ...props.value, ...part }].map(imageOf);
  const [down, across] = [after.height / before.height, after.width / before.width];
  const { top, left, height, width } = props.value;
  change({ ...part, top: top * down, left: left * across, height: height * down, width: width * across });
}

const resize = (side) => recast({ original_size: clamp(side, 1, props.side) });
const reshape = (place) => recast({ shape: props.shapes[place][0] });

function show() {
  const view = props.value;
  for (const choice of choices) choice[valueOf(choice)] = view[choice.name];
  input("original_size").value = view.original_size;
  input("side").value = view.original_size;
  for (const name of NUMBERS) input(name).value = Math.round(view[name] * 10) / 10;
  draw(view);
  drawShape(view);
}

function scale() {
  // Canvas pixels per image pixel.
  const { height, width } = imageOf(props.value);
  return (CANVAS - 2 * MARGIN) / Math.max(height, width);
}

function corners({ top, left, height, width }) {
  return [[left, top], [left + width, top], [left, top + height], [left + width, top + height]];
}

function draw(view) {
  const { height, width } = imageOf(view);
  canvas.height = 2 * MARGIN + height * scale();
  canvas.width = 2 * MARGIN + width * scale();
  stage.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
  const points = corners(view).map((point) => point.map((value) => MARGIN + value * scale()));
  const [[x, y], , , [right, bottom]] = points;
  const accent = getComputedStyle(canvas).color;
  context.fillStyle = "rgb(15 23 42 / 62%)";
  context.fillRect(MARGIN, MARGIN, width * scale(), height * scale());
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
  const image = imageOf(props.value);
  const [x0, x1] = [one[0], other[0]].map((value) => clamp(Math.round(value), 0, image.width));
  const [y0, y1] = [one[1], other[1]].map((value) => clamp(Math.round(value), 0, image.height));
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
  const image = imageOf(view);
  const isWhole = view.height === image.height && view.width === image.width;
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

function drawShape(view) {
  const place = shapeOf(view);
  const [, size, height, width] = props.shapes[place];
  input("size").value = size;
  shapeCanvas.ariaValueNow = place;
  shapeCanvas.ariaValueText = size;
  const side = shapeCanvas.width;
  const unit = (side / 2 - HANDLE) / Math.max(...props.shapes.flatMap(([, , ...sides]) => sides));
  const [right, bottom] = [width, height].map((length) => side / 2 + length * unit);
  const pen = shapeCanvas.getContext("2d");
  pen.clearRect(0, 0, side, side);
  pen.lineWidth = 4;
  pen.strokeStyle = getComputedStyle(shapeCanvas).color;
  pen.strokeRect(side - right, side - bottom, 2 * right - side, 2 * bottom - side);
  pen.fillStyle = "white";
  pen.beginPath();
  pen.rect(right - HANDLE, bottom - HANDLE, 2 * HANDLE, 2 * HANDLE);
  pen.fill();
  pen.stroke();
}

function dragShape(event) {
  // The shape whose corner is in the direction of the pointer from the centre.
  const box = shapeCanvas.getBoundingClientRect();
  const across = Math.abs(event.clientX - box.left - box.width / 2) + 1;
  const down = Math.abs(event.clientY - box.top - box.height / 2) + 1;
  const far = props.shapes.map(([, , height, width]) => Math.abs(Math.log((height * across) / (width * down))));
  reshape(far.indexOf(Math.min(...far)));
}

shapeCanvas.addEventListener("pointerdown", (event) => {
  shapeCanvas.setPointerCapture(event.pointerId);
  dragShape(event);
});
shapeCanvas.addEventListener("pointermove", (event) => event.buttons && dragShape(event));
shapeCanvas.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  reshape(clamp(shapeOf(props.value) + step, 0, props.shapes.length - 1));
});

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
element.querySelector("img").addEventListener("load", show);
show();
