import { Refusal } from './password/errors.ts';

/** Where a call's time went, in milliseconds. */
export type Phase = 'queue' | 'hash' | 'database';

/**
 * How long somebody waits for a piece of work, and whether anybody still does. Every step that costs something
 * asks first, so that no work is begun for a call that nobody waits for.
 */
export class Wait {
  /** Aborted when the caller goes away or the deadline passes. */
  readonly signal: AbortSignal;
  /** On the clock of `performance.now()`. */
  readonly deadline: number;
  readonly spent: Record<Phase, number> = { queue: 0, hash: 0, database: 0 };

  constructor(signal: AbortSignal, deadline: number) {
    this.signal = signal;
    this.deadline = deadline;
  }

  /** For work that no remote caller waits for: the command line's, the background's. */
  static forMs(ms: number): Wait {
    const controller = new AbortController();
    setTimeout(() => controller.abort(new Refusal('DEADLINE_EXCEEDED')), ms).unref();
    return new Wait(controller.signal, performance.now() + ms);
  }

  remainingMs(): number {
    return this.deadline - performance.now();
  }

  /** @throws Refusal DEADLINE_EXCEEDED or CANCELLED if nobody waits any more. */
  throwIfOver(): void {
    if (this.remainingMs() <= 0) throw new Refusal('DEADLINE_EXCEEDED');
    if (this.signal.aborted)
      throw new Refusal(this.signal.reason instanceof Refusal ? this.signal.reason.reason : 'CANCELLED');
  }

  /** Runs `work` and books its time under `phase`. */
  async timed<T>(phase: Phase, work: () => Promise<T>): Promise<T> {
    const start = performance.now();
    try {
      return await work();
    } finally {
      this.spent[phase] += performance.now() - start;
    }
  }
}

/** Who calls, from where, and until when: the metadata of a request, checked. */
export interface Call {
  readonly cid: string;
  /** Empty where the method takes none. */
  readonly ust: string;
  readonly app: string;
  readonly idempotencyKey: string | undefined;
  /** The end user's address: the claimed one from a trusted peer, else the peer's. */
  readonly remoteAddress: string;
  readonly peerAddress: string;
  /** What `remote-addr` said, believed or not. */
  readonly claimedAddress: string | undefined;
  readonly wait: Wait;
  /** What is learnt on the way, for the log. */
  readonly learnt: { actorUserId?: string; targetUserId?: string; replayed?: boolean };
}
