// Shows an image with its mask and a map, zoomed and moved; finds the pixel at a pointer.
const MASK_COLOR = 0xfff8bd38;  // opacity, blue, green, red

class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.scale = 1;
    this.left = this.top = 0;
    this.image = this.heat = this.box = this.cross = this.pointer = null;
    this.tint = document.createElement("canvas");
    this.edge = document.createElement("canvas");
    this.maskOpacity = 0.45;
    this.heatOpacity = 0.7;
    this.sketch = () => {};
    this.waiting = false;
    new ResizeObserver(() => this.resized()).observe(canvas);
  }

  // Removes mask and map of another image or class.
  forget() {
    this.mask = this.values = this.heat = null;
    for (const canvas of [this.tint, this.edge]) canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    this.draw();
  }

  get size() { return {width: this.canvas.clientWidth, height: this.canvas.clientHeight}; }

  show(image) {
    this.image = image;
    for (const canvas of [this.tint, this.edge]) {
      canvas.width = image.width;
      canvas.height = image.height;
    }
    this.fit();
  }

  resized() {
    const ratio = window.devicePixelRatio || 1;
    const middle = this.toImage(this.size.width / 2, this.size.height / 2, true);
    this.canvas.width = Math.round(this.size.width * ratio);
    this.canvas.height = Math.round(this.size.height * ratio);
    if (this.fitted || !this.image) this.fit();
    else {
      this.left = this.size.width / 2 - middle.x * this.scale;
      this.top = this.size.height / 2 - middle.y * this.scale;
      this.draw();
    }
  }

  fit() {
    if (!this.image) return;
    const {width, height} = this.size;
    let scale = Math.min((width - 32) / this.image.width, (height - 32) / this.image.height);
    if (scale > 2) scale = Math.floor(scale);  // whole pixels look sharp
    this.scale = Math.max(scale, 0.01);
    this.left = Math.round((width - this.image.width * this.scale) / 2);
    this.top = Math.round((height - this.image.height * this.scale) / 2);
    this.fitted = true;
    this.moved();
  }

  zoom(factor, x = this.size.width / 2, y = this.size.height / 2) {
    const scale = Math.min(64, Math.max(0.02, this.scale * factor));
    this.left = x - (x - this.left) * scale / this.scale;
    this.top = y - (y - this.top) * scale / this.scale;
    this.scale = scale;
    this.fitted = false;
    this.moved();
  }

  pan(dx, dy) {
    this.left += dx;
    this.top += dy;
    this.fitted = false;
    this.moved();
  }

  moved() {
    // For scripts that must find a pixel from outside.
    Object.assign(this.canvas.dataset, {scale: this.scale, left: this.left, top: this.top});
    if (this.onmove) this.onmove();
    this.draw();
  }

  toImage(x, y, inside = false) {
    const frame = inside ? {left: 0, top: 0} : this.canvas.getBoundingClientRect();
    return {x: (x - frame.left - this.left) / this.scale, y: (y - frame.top - this.top) / this.scale};
  }

  // Colours the mask and its border, where it changed.
  paint(mask, changed = null) {
    const {width, height} = this.tint;
    this.mask = mask;
    const left = Math.max(0, changed ? changed.left - 1 : 0), top = Math.max(0, changed ? changed.top - 1 : 0);
    const right = Math.min(width, changed ? changed.right + 1 : width);
    const bottom = Math.min(height, changed ? changed.bottom + 1 : height);
    if (right <= left || bottom <= top) return;
    const tint = new ImageData(right - left, bottom - top), edge = new ImageData(right - left, bottom - top);
    const inside = new Uint32Array(tint.data.buffer), border = new Uint32Array(edge.data.buffer);
    for (let y = top, at = 0; y < bottom; y++) {
      for (let x = left; x < right; x++, at++) {
        const place = y * width + x;
        if (!mask[place]) continue;
        inside[at] = MASK_COLOR;
        if (!x || x === width - 1 || !mask[place - 1] || !mask[place + 1] ||
            !y || y === height - 1 || !mask[place - width] || !mask[place + width]) border[at] = MASK_COLOR;
      }
    }
    this.tint.getContext("2d").putImageData(tint, left, top);
    this.edge.getContext("2d").putImageData(edge, left, top);
    this.draw();
  }

  // A thin line around the mask where pixels are large; only its visible part is drawn.
  outline(context) {
    const {mask, scale} = this, {width, height} = this.tint;
    if (!mask) return;
    const left = Math.max(0, Math.floor(-this.left / scale)), top = Math.max(0, Math.floor(-this.top / scale));
    const right = Math.min(width, Math.ceil((this.size.width - this.left) / scale));
    const bottom = Math.min(height, Math.ceil((this.size.height - this.top) / scale));
    const at = (x, y) => x >= 0 && y >= 0 && x < width && y < height && mask[y * width + x];
    context.beginPath();
    for (let y = top; y <= bottom; y++) {
      for (let x = left; x <= right; x++) {
        const inside = at(x, y);
        if (Boolean(inside) !== Boolean(at(x - 1, y))) { context.moveTo(x, y); context.lineTo(x, y + 1); }
        if (Boolean(inside) !== Boolean(at(x, y - 1))) { context.moveTo(x, y); context.lineTo(x + 1, y); }
      }
    }
    context.strokeStyle = "#38bdf8";
    context.lineWidth = 2 / scale;
    context.lineCap = "square";
    context.stroke();
  }

  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.drawNow();
    });
  }

  drawNow() {
    const {context, canvas, image} = this, ratio = canvas.width / (this.size.width || 1);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!image) return;
    context.setTransform(ratio * this.scale, 0, 0, ratio * this.scale, ratio * this.left, ratio * this.top);
    context.imageSmoothingEnabled = this.scale < 3;
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0);
    if (this.heat) {
      context.globalAlpha = this.heatOpacity;
      context.imageSmoothingEnabled = true;
      context.save();
      context.beginPath();
      context.rect(0, 0, image.width, image.height);
      context.clip();
      drawHeat(context, this.heat, this.box);
      context.restore();
    }
    context.globalAlpha = this.maskOpacity;
    context.imageSmoothingEnabled = false;
    context.drawImage(this.tint, 0, 0);
    context.globalAlpha = Math.min(1, 2 * this.maskOpacity);
    if (this.scale < 4) context.drawImage(this.edge, 0, 0);
    else this.outline(context);
    context.globalAlpha = 1;
    this.sketch(context, this.scale);
  }
}

// A map as a small image, from transparent at 0 over yellow to red at 1.
function heatImage(values) {
  const canvas = document.createElement("canvas");
  canvas.width = values[0].length;
  canvas.height = values.length;
  const pixels = new ImageData(canvas.width, canvas.height);
  values.flat().forEach((value, place) => {
    const green = Math.round(225 - 190 * value), blue = Math.round(60 * (1 - value));
    pixels.data.set([255, green, blue, Math.round(255 * Math.min(1, 1.15 * value))], 4 * place);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

function drawHeat(context, heat, [left, top, right, bottom]) {
  context.drawImage(heat, left, top, right - left, bottom - top);
}
