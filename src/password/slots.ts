import type { Wait } from '../call.ts';
import { Refusal } from './errors.ts';
import { FairQueue } from './fair_queue.ts';

/** Somebody who wants to hash: who it is, for fairness, and how long somebody waits for it. */
export interface Applicant {
  /** From the widest to the narrowest: application, peer, user. */
  readonly path: readonly string[];
  readonly wait: Wait;
  /** How many hashes will be made one after the other. */
  readonly hashes: number;
}

interface Waiting {
  readonly applicant: Applicant;
  readonly start: () => void;
  readonly refuse: (refusal: Refusal) => void;
}

/** Weight of the newest measurement in the moving average: some twenty hashes look back. */
const NEWEST_WEIGHT = 0.1;
/**
 * An expectation is a mean, and knows nothing of what a call does before and after its hashes: whoever is let in
 * would be in time even if it all took so many times as long.
 */
const SAFETY_FACTOR = 2;
const RETRY_AFTER_MIN_MS = 100;
const RETRY_AFTER_MAX_MS = 10_000;

/**
 * The bound on concurrent hashing. Waiting is fair and bounded; who cannot be served before the own deadline is
 * told so at once, and who stops waiting is never served.
 *
 * As many slots as cores + 1 keep the libuv pool (as many threads as cores) busy while one call talks to the
 * database; more cost memory and latency and bring nothing.
 */
export class Slots {
  readonly #capacity: number;
  readonly #queueLength: number;
  readonly #queue = new FairQueue<Waiting>();
  /** Calls under way that hash, have hashed or will. */
  readonly #admitted = new FairQueue<object>();
  #taken = 0;
  #hashMs: number;

  /** @param hashMs how long a slot is expected to be taken for each hash, until there are measurements. */
  constructor(capacity: number, queueLength: number, hashMs: number) {
    this.#capacity = capacity;
    this.#queueLength = queueLength;
    this.#hashMs = hashMs;
  }

  get taken(): number {
    return this.#taken;
  }

  get waiting(): number {
    return this.#queue.size;
  }

  /** How long a slot is taken for each hash, what is done in it beside hashing included, in milliseconds. */
  get hashMs(): number {
    return this.#hashMs;
  }

  /**
   * Runs `work` in a slot.
   * @throws Refusal OVERLOADED if there is no room before the deadline; DEADLINE_EXCEEDED or CANCELLED if nobody
   *   waits any more.
   */
  async run<T>(applicant: Applicant, work: () => Promise<T>): Promise<T> {
    applicant.wait.throwIfOver();
    if (applicant.hashes === 0) return await work();
    await applicant.wait.timed('queue', async () => this.#take(applicant));
    const start = performance.now();
    try {
      const result = await work();
      this.#measured((performance.now() - start) / applicant.hashes);
      return result;
    } finally {
      this.#taken--;
      this.#startNext();
    }
  }

  /**
   * Runs the whole of a call that is going to hash. Most of what a call costs beside its hashes comes before them,
   * and under overload it would be in vain: so who cannot be served is refused before any of it is done.
   * @throws Refusal OVERLOADED if it could not be served before the deadline, after those under way.
   */
  async admit<T>({ path, wait, hashes }: Applicant, work: () => Promise<T>): Promise<T> {
    const expectedMs = this.#msFor(this.#admitted.ahead(path) + 1, hashes);
    if (this.#admitted.size >= this.#capacity && SAFETY_FACTOR * expectedMs > wait.remainingMs())
      throw overloaded(expectedMs);
    const place = {};
    this.#admitted.push(path, place);
    try {
      return await work();
    } finally {
      this.#admitted.delete(path, place);
    }
  }

  #take(applicant: Applicant): Promise<void> | undefined {
    const expectedMs = this.#expectedMs(applicant);
    if (!this.#isIdle && expectedMs > applicant.wait.remainingMs()) throw overloaded(expectedMs);
    if (this.#taken < this.#capacity) {
      this.#taken++;
      return undefined;
    }
    return new Promise((resolve, reject) => {
      const leave = () => {
        if (this.#queue.delete(applicant.path, waiting))
          reject(asRefusal(() => applicant.wait.throwIfOver()));
      };
      const settle = (then: () => void) => {
        applicant.wait.signal.removeEventListener('abort', leave);
        then();
      };
      const waiting: Waiting = {
        applicant,
        start: () => settle(resolve),
        refuse: (refusal) => settle(() => reject(refusal)),
      };
      applicant.wait.signal.addEventListener('abort', leave, { once: true });
      this.#queue.push(applicant.path, waiting);
      if (this.#queue.size > this.#queueLength) this.#queue.dropFromLongest()?.refuse(overloaded(expectedMs));
    });
  }

  /** Then somebody is let in whatever the expectation: nothing else could ever correct it, after a pause of the machine say. */
  get #isIdle(): boolean {
    return this.#taken === 0;
  }

  /** How long until `applicant` would be done if it came now, in milliseconds. */
  #expectedMs({ path, hashes }: Applicant): number {
    return this.#msFor(this.#taken < this.#capacity ? 0 : this.#queue.ahead(path) + 1, hashes);
  }

  /** How long it takes to hash after so many others, in milliseconds. */
  #msFor(before: number, hashes: number): number {
    return (before / this.#capacity + 1) * hashes * this.#hashMs;
  }

  #measured(ms: number): void {
    this.#hashMs += (ms - this.#hashMs) * NEWEST_WEIGHT;
  }

  #startNext(): void {
    while (this.#taken < this.#capacity) {
      const next = this.#queue.shift();
      if (!next) return;
      const { wait, hashes } = next.applicant;
      const neededMs = this.#isIdle ? 0 : hashes * this.#hashMs;
      if (wait.remainingMs() < neededMs) {
        next.refuse(overloaded(neededMs));
        continue;
      }
      this.#taken++;
      next.start();
    }
  }
}

function overloaded(expectedMs: number): Refusal {
  const jittered = expectedMs * (1 + Math.random());
  return new Refusal('OVERLOADED', {
    retryAfterMs: Math.round(Math.min(RETRY_AFTER_MAX_MS, Math.max(RETRY_AFTER_MIN_MS, jittered))),
  });
}

function asRefusal(check: () => void): Refusal {
  try {
    check();
  } catch (error) {
    if (error instanceof Refusal) return error;
  }
  return new Refusal('CANCELLED');
}
