/**
 * What a password is, seen from outside: one register a user. Whether a history of calls can be explained by such a
 * register is decided by Wing and Gong's search with Lowe's cache ("Testing for linearizability", 2017), a user at
 * a time: linearizability is local, so a history is right if each user's part of it is.
 */

/** What was asked of one user's register. */
export type Action =
  /** A change that proves the old password. */
  | { readonly kind: 'change'; readonly from: string; readonly to: string }
  /** A super-user's change, whatever the password was before. */
  | { readonly kind: 'set'; readonly to: string }
  /** A log-in, or a refusal of a wrong old password. */
  | { readonly kind: 'verify'; readonly password: string };

/**
 * - `ok`: it was done; of `verify`: the password was right.
 * - `wrong`: the password sent was not the one that stood there. No effect.
 * - `refused`: no effect, and nothing is learnt of the register.
 * - `unknown`: it may take effect at any time after it was sent, or never.
 */
export type Outcome = 'ok' | 'wrong' | 'refused' | 'unknown';

export interface Operation {
  readonly id: string;
  readonly action: Action;
  readonly outcome: Outcome;
  /** Places in the one order of all sends and replies; `returned` is of no meaning where the outcome is unknown. */
  readonly called: number;
  readonly returned: number;
}

export type Verdict =
  | { readonly kind: 'linearizable'; readonly order: readonly Operation[]; readonly final: string }
  /** The search was given up; neither right nor wrong. */
  | { readonly kind: 'undecided'; readonly steps: number }
  | { readonly kind: 'violation'; readonly history: readonly Operation[] };

const STEPS_MAX = 1_000_000;

/** @param initial the password at the beginning. */
export function checkRegister(
  initial: string,
  history: readonly Operation[],
  stepsMax: number = STEPS_MAX,
): Verdict {
  const found = search(initial, history, stepsMax);
  if (found.kind !== 'impossible') return found;
  return { kind: 'violation', history: minimise(initial, history, stepsMax) };
}

/** What an operation makes of the register; undefined: it can't have happened here. */
function step(password: string, { action, outcome }: Operation): string | undefined {
  switch (action.kind) {
    case 'set':
      return action.to;
    case 'change':
      if (outcome === 'wrong') return password === action.from ? undefined : password;
      return password === action.from ? action.to : undefined;
    case 'verify':
      return (password === action.password) === (outcome === 'ok') ? password : undefined;
  }
}

/** Whether an operation says anything at all about the register. */
const matters = ({ action, outcome }: Operation) =>
  outcome === 'ok' ||
  (outcome === 'wrong' && action.kind !== 'set') ||
  (outcome === 'unknown' && action.kind !== 'verify');

interface Frame {
  readonly password: string;
  readonly candidates: readonly number[];
  next: number;
}

function search(
  initial: string,
  history: readonly Operation[],
  stepsMax: number,
): Exclude<Verdict, { kind: 'violation' }> | { kind: 'impossible' } {
  const operations = history.filter(matters);
  const isOpen = operations.map(({ outcome }) => outcome === 'unknown');
  // Whose reply came first is tried first; what may never have happened comes last.
  const byReturn = operations
    .map((_, index) => index)
    .sort((a, b) => endOf(operations[a] as Operation) - endOf(operations[b] as Operation));
  const done = new Uint8Array(operations.length);
  let left = isOpen.filter((open) => !open).length;
  const seen = new Set<string>();
  const order: Operation[] = [];
  let steps = 0;

  /** An operation may come next if no other one that is still to come was over before it was called. */
  const candidatesNow = (): number[] => {
    const firstReturn = byReturn.find((index) => !done[index] && !isOpen[index]);
    const before =
      firstReturn === undefined ? Number.POSITIVE_INFINITY : (operations[firstReturn] as Operation).returned;
    return byReturn.filter((index) => !done[index] && (operations[index] as Operation).called < before);
  };
  const frames: Frame[] = [{ password: initial, candidates: candidatesNow(), next: 0 }];
  const taken: number[] = [];
  for (;;) {
    const frame = frames.at(-1) as Frame;
    if (left === 0) return { kind: 'linearizable', order, final: frame.password };
    const index = frame.candidates[frame.next++];
    if (index === undefined) {
      frames.pop();
      const undone = taken.pop();
      if (undone === undefined) return { kind: 'impossible' };
      done[undone] = 0;
      order.pop();
      if (!isOpen[undone]) left++;
      continue;
    }
    const password = step(frame.password, operations[index] as Operation);
    if (password === undefined) continue;
    if (++steps > stepsMax) return { kind: 'undecided', steps };
    done[index] = 1;
    const key = `${done.join('')} ${password}`;
    if (seen.has(key)) {
      done[index] = 0;
      continue;
    }
    seen.add(key);
    taken.push(index);
    order.push(operations[index] as Operation);
    if (!isOpen[index]) left--;
    frames.push({ password, candidates: candidatesNow(), next: 0 });
  }
}

const endOf = ({ outcome, returned }: Operation) =>
  outcome === 'unknown' ? Number.POSITIVE_INFINITY : returned;

/** The shortest beginning of the history that is wrong already, without the reads that it is wrong without, too. */
function minimise(initial: string, history: readonly Operation[], stepsMax: number): Operation[] {
  const isWrong = (part: readonly Operation[]) => search(initial, part, stepsMax).kind === 'impossible';
  const ends = history.filter((operation) => matters(operation)).map(endOf);
  let part = [...history].filter(matters);
  for (const end of ends.filter(Number.isFinite).sort((a, b) => a - b)) {
    const beginning = upTo(history, end);
    if (!isWrong(beginning)) continue;
    part = beginning;
    break;
  }
  for (const operation of [...part].reverse()) {
    // Without a write the rest may be wrong that was right with it.
    const hasEffect = operation.action.kind !== 'verify' && operation.outcome !== 'wrong';
    const rest = part.filter((other) => other !== operation);
    if (!hasEffect && isWrong(rest)) part = rest;
  }
  return part.sort((a, b) => a.called - b.called);
}

/** What was known at a moment: who had no reply yet may have had any effect. */
function upTo(history: readonly Operation[], moment: number): Operation[] {
  return history
    .filter((operation) => matters(operation) && operation.called <= moment)
    .map((operation) =>
      endOf(operation) <= moment ? operation : { ...operation, outcome: 'unknown' as const },
    )
    .filter(matters);
}

/** An operation in a line that a person can read. */
export function describe({ id, action, outcome, called, returned }: Operation): string {
  const what =
    action.kind === 'change'
      ? `change ${action.from} -> ${action.to}`
      : action.kind === 'set'
        ? `set ${action.to}`
        : `verify ${action.password}`;
  const when = `${called}-${outcome === 'unknown' ? '…' : returned}`;
  return `${when.padEnd(16)} ${id.padEnd(12)} ${outcome.padEnd(8)} ${what}`;
}
