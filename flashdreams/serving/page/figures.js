// Live figures: measured by the browser, and reported by the server once a second.

import { byId, element, inBytes, inMs, setText } from './dom.js';
import { percentile } from './receipts.js';

const EVERY_MS = 500;

/** Writes the figures; each has a fixed place, so that the layout does not move. */
export class Figures {
  /**
   * @param {import('./receipts.js').Receipts} receipts
   * @param {import('./player.js').Player} player
   */
  constructor(receipts, player) {
    this.receipts = receipts;
    this.player = player;
    this.status = null;
    this.fps = null;
    this.chunk = null;
    setInterval(() => this.measure(), EVERY_MS);
  }

  /** @param {number} fps the frame rate of the video */
  begin(fps) {
    this.fps = fps;
    this.status = null;
  }

  /** @param {{generation_chunk_index: number}} message */
  onApplied(message) {
    setText(byId('figure-applied'), `chunk ${message.generation_chunk_index}`);
  }

  measure() {
    const { latencies, fps } = this.receipts;
    setText(byId('figure-fps'), fps ? fps.toFixed(1) : '–');
    setText(byId('figure-fps-of'), this.fps ? `of ${round(this.fps)}` : '');
    setText(byId('pulse-fps'), fps ? fps.toFixed(1) : '–');
    setText(byId('pulse-photon'), inMs(percentile(latencies, 0.5)));
    setText(byId('figure-p50'), inMs(percentile(latencies, 0.5)));
    setText(byId('figure-p99'), inMs(percentile(latencies, 0.99)));
    const waiting = this.player.waiting;
    setText(byId('figure-queue'), `${waiting} ${waiting === 1 ? 'frame' : 'frames'}`);
  }

  /** @param {Object} status `session.status` */
  onStatus(status) {
    this.status = status;
    setText(byId('figure-made'), status.frames_per_second.toFixed(1));
    const bytes = status.device_bytes ?? status.host_bytes;
    setText(byId('figure-memory'), inBytes(bytes));
    setText(byId('figure-memory-of'), status.device_bytes === null ? 'host' : 'device');
    setText(byId('sharing'), this.sharing(status));
    this.stages(status.chunk_ms);
  }

  sharing({ sessions, queued, frames_per_second: made }) {
    const waiting = queued ? ` ${queued} more ${queued === 1 ? 'is waiting' : 'are waiting'}.` : '';
    if (sessions < 2) return `This session has the machine to itself.${waiting}`;
    const slow = this.fps && made < 0.95 * this.fps;
    const pace = slow
      ? `runs at ${made.toFixed(1)} of ${round(this.fps)} frames/s`
      : 'runs at full speed';
    return `${sessions} sessions share this machine: each ${pace}.${waiting}`;
  }

  stages(chunkMs) {
    const stages = Object.entries(chunkMs).filter(([name, ms]) => name !== 'total' && ms > 0.005);
    const sum = stages.reduce((all, [, ms]) => all + ms, 0);
    const total = chunkMs.total ?? sum;
    setText(byId('figure-chunk'), total ? inMs(total) : '–');
    const key = stages.map(([name]) => name).join();
    if (key !== this.stageNames) {
      this.stageNames = key;
      byId('stage-bar').replaceChildren(...stages.map((_, at) => element('i', { class: `s${at % 6}` })));
      byId('stage-list').replaceChildren(
        ...stages.map(([name], at) =>
          element('li', {}, element('i', { class: `s${at % 6}` }), name.replaceAll('_', ' '), element('b')),
        ),
      );
    }
    stages.forEach(([, ms], at) => {
      byId('stage-bar').children[at].style.flexGrow = String(ms / sum);
      setText(byId('stage-list').children[at].lastChild, inMs(ms));
    });
  }
}

function round(number) {
  return String(Math.round(number * 10) / 10);
}
