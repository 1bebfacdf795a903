import { randomInt } from 'node:crypto';

/** A source of chance that does the same again from the same seed (mulberry32). */
export interface Random {
  readonly seed: number;
  /** 0 to `below` - 1. */
  int(below: number): number;
  pick<T>(from: readonly T[]): T;
}

/** @param seed absent: a new one; the test that fails prints it. */
export function seededRandom(seed: number = randomInt(2 ** 32)): Random {
  let state = seed;
  const next = () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  const int = (below: number) => Math.floor(next() * below);
  return { seed, int, pick: (from) => from[int(from.length)] as (typeof from)[number] };
}
