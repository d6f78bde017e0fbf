// Masks as bytes, one for each pixel, row by row. A pixel belongs to a shape if its centre does.
const Raster = {
  // A disc that is drawn from one point to another. The pixels at both points always belong to it. Returns the
  // rectangle that may have changed.
  stroke(mask, width, height, from, to, radius, value) {
    const left = Math.max(0, Math.floor(Math.min(from.x, to.x) - radius - 1));
    const right = Math.min(width - 1, Math.ceil(Math.max(from.x, to.x) + radius + 1));
    const top = Math.max(0, Math.floor(Math.min(from.y, to.y) - radius - 1));
    const bottom = Math.min(height - 1, Math.ceil(Math.max(from.y, to.y) + radius + 1));
    const dx = to.x - from.x, dy = to.y - from.y, length = dx * dx + dy * dy, limit = radius * radius;
    for (let row = top; row <= bottom; row++) {
      for (let column = left; column <= right; column++) {
        const x = column + 0.5 - from.x, y = row + 0.5 - from.y;
        const along = length ? Math.min(1, Math.max(0, (x * dx + y * dy) / length)) : 0;
        const ex = x - along * dx, ey = y - along * dy;
        if (ex * ex + ey * ey <= limit) mask[row * width + column] = value;
      }
    }
    for (const point of [from, to]) {
      const column = Math.floor(point.x), row = Math.floor(point.y);
      if (column >= 0 && column < width && row >= 0 && row < height) mask[row * width + column] = value;
    }
    return {left, top, right: right + 1, bottom: bottom + 1};
  },

  // By the even–odd rule.
  polygon(mask, width, height, points, value) {
    const crossings = new Uint8Array(width + 1);
    const low = Math.min(...points.map((p) => p.y)), high = Math.max(...points.map((p) => p.y));
    for (let row = Math.max(0, Math.floor(low)); row < Math.min(height, Math.ceil(high)); row++) {
      crossings.fill(0);
      const y = row + 0.5;
      points.forEach((a, index) => {
        const b = points[(index + 1) % points.length];
        if (a.y <= y === b.y <= y) return;
        const x = a.x + (y - a.y) * (b.x - a.x) / (b.y - a.y);
        crossings[Math.min(width, Math.max(0, Math.ceil(x - 0.5)))] ^= 1;
      });
      for (let column = 0, inside = 0; column < width; column++) {
        inside ^= crossings[column];
        if (inside) mask[row * width + column] = value;
      }
    }
  },

  rectangle(mask, width, height, a, b, value) {
    const corners = [{x: a.x, y: a.y}, {x: b.x, y: a.y}, {x: b.x, y: b.y}, {x: a.x, y: b.y}];
    Raster.polygon(mask, width, height, corners, value);
  },

  // In the rectangle between two corners.
  ellipse(mask, width, height, a, b, value) {
    const cx = (a.x + b.x) / 2, cy = (a.y + b.y) / 2;
    const rx = Math.abs(a.x - b.x) / 2, ry = Math.abs(a.y - b.y) / 2;
    if (!rx || !ry) return;
    for (let row = Math.max(0, Math.floor(cy - ry)); row < Math.min(height, Math.ceil(cy + ry)); row++) {
      for (let column = Math.max(0, Math.floor(cx - rx)); column < Math.min(width, Math.ceil(cx + rx)); column++) {
        const x = (column + 0.5 - cx) / rx, y = (row + 0.5 - cy) / ry;
        if (x * x + y * y <= 1) mask[row * width + column] = value;
      }
    }
  },

  // The pixels that are connected to a pixel, side by side, and equal to it.
  fill(mask, width, height, point, value) {
    const column = Math.floor(point.x), row = Math.floor(point.y);
    if (column < 0 || column >= width || row < 0 || row >= height) return;
    const waiting = [row * width + column], old = mask[waiting[0]];
    if (old === value) return;
    mask[waiting[0]] = value;
    while (waiting.length) {
      const place = waiting.pop(), x = place % width;
      for (const next of [x ? place - 1 : -1, x < width - 1 ? place + 1 : -1, place - width, place + width]) {
        if (next >= 0 && next < mask.length && mask[next] === old) {
          mask[next] = value;
          waiting.push(next);
        }
      }
    }
  },

  // Eight pixels per byte, the first in the highest bit.
  pack(mask) {
    const bytes = new Uint8Array(Math.ceil(mask.length / 8));
    for (let place = 0; place < mask.length; place++) if (mask[place]) bytes[place >> 3] |= 128 >> (place & 7);
    return bytes;
  },

  unpack(bytes, length) {
    const mask = new Uint8Array(length);
    for (let place = 0; place < length; place++) mask[place] = (bytes[place >> 3] >> (7 - (place & 7))) & 1;
    return mask;
  },
};
