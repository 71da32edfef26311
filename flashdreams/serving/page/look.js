// Looking around: the mouse with pointer lock or by dragging, a finger, and the arrow keys.

const DEGREES_PER_PIXEL = 0.15;
const DEGREES_PER_SECOND = 75;
const MOST_DEGREES = 180; // at once, after the page was held up
const EVERY_MS = 33;
const CLICK_PIXELS = 4;
const TURNS = {
  ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1],
};

/** Collects turns of the view and reports them, some thirty times a second. */
export class Look {
  /**
   * @param {HTMLElement} stage
   * @param {function([number, number], number)} onLook called with degrees of yaw to the right and of
   *     pitch up since the last call, and the time of the first input among them
   */
  constructor(stage, onLook) {
    this.stage = stage;
    this.onLook = onLook;
    this.sensitivity = 1;
    this.enabled = false;
    this.arrows = new Set();
    this.held = new Set();
    this.reset();
    stage.addEventListener('pointerdown', (event) => this.onDown(event));
    stage.addEventListener('pointermove', (event) => this.onMove(event));
    for (const type of ['pointerup', 'pointercancel']) {
      stage.addEventListener(type, (event) => this.onUp(event));
    }
    stage.addEventListener('keydown', (event) => this.onKey(event));
    stage.addEventListener('keyup', (event) => this.held.delete(event.code));
    stage.addEventListener('blur', () => this.held.clear());
    document.addEventListener('pointerlockchange', () => {
      stage.classList.toggle('locked', this.locked);
    });
  }

  /**
   * Enable or disable it.
   * @param {boolean} enabled
   * @param {Set<string>} arrows arrow keys that turn the view, because they do nothing else
   */
  use(enabled, arrows) {
    this.enabled = enabled;
    this.arrows = arrows;
    this.stage.classList.toggle('looks', enabled);
    if (!enabled && this.locked) document.exitPointerLock();
  }

  get locked() {
    return document.pointerLockElement === this.stage;
  }

  reset() {
    this.turn = [0, 0];
    this.since = null;
    this.dragged = null;
  }

  onDown(event) {
    if (!this.enabled || event.button !== 0 || this.locked) return;
    if (event.target.closest('button')) return;
    this.dragged = { id: event.pointerId, x: event.clientX, y: event.clientY, far: 0 };
    try {
      this.stage.setPointerCapture(event.pointerId);
    } catch {
      // the pointer is already gone
    }
  }

  onMove(event) {
    if (!this.enabled) return;
    if (this.locked) this.add(event.movementX, event.movementY, event.timeStamp);
    else if (this.dragged?.id === event.pointerId) {
      const dx = event.clientX - this.dragged.x;
      const dy = event.clientY - this.dragged.y;
      this.dragged = {
        ...this.dragged, x: event.clientX, y: event.clientY,
        far: this.dragged.far + Math.abs(dx) + Math.abs(dy),
      };
      // A finger drags the image; a mouse points where the view goes.
      const way = event.pointerType === 'touch' ? -1.5 : 1;
      this.add(way * dx, way * dy, event.timeStamp);
    }
  }

  onUp(event) {
    const dragged = this.dragged;
    this.dragged = null;
    if (!dragged || dragged.id !== event.pointerId || event.type !== 'pointerup') return;
    if (event.pointerType !== 'mouse' || dragged.far > CLICK_PIXELS) return;
    // Some browsers return nothing, others a promise that may be rejected: dragging still works.
    Promise.resolve(this.stage.requestPointerLock?.()).catch(() => {});
  }

  onKey(event) {
    if (!this.enabled || !this.arrows.has(event.code) || event.target !== this.stage) return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (event.repeat) return;
    this.held.add(event.code);
    this.heldAt = performance.now();
    this.schedule(event.timeStamp);
  }

  add(dx, dy, time) {
    const factor = DEGREES_PER_PIXEL * this.sensitivity;
    this.turn = [this.turn[0] + dx * factor, this.turn[1] - dy * factor];
    this.schedule(time);
  }

  schedule(time) {
    this.since ??= time;
    this.timer ??= setTimeout(() => this.hand(), EVERY_MS);
  }

  hand() {
    this.timer = null;
    const now = performance.now();
    for (const code of this.held) {
      const step = (DEGREES_PER_SECOND * Math.min(100, now - this.heldAt)) / 1000;
      this.turn = this.turn.map((value, axis) => value + TURNS[code][axis] * step);
    }
    this.heldAt = now;
    const bounded = (value) => Math.max(-MOST_DEGREES, Math.min(MOST_DEGREES, value));
    const [yaw, pitch] = this.turn.map((value) => Math.round(bounded(value) * 100) / 100);
    const since = this.since;
    this.turn = [0, 0];
    this.since = null;
    if (yaw || pitch) this.onLook([yaw, pitch], since ?? now);
    if (this.held.size) this.schedule(now);
  }
}
