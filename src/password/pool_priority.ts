import { readdirSync, readFileSync } from 'node:fs';
import { setPriority } from 'node:os';

/** Enough for whatever wakes up to go first, and not so much that hashing starves beside other programs. */
const NICENESS = 10;

/**
 * Hashing gives way to everything else: the threads of libuv's pool, which do next to nothing but hash, get a lower
 * priority than the one that answers health checks, refusals and look-ups. They must have been started, which the
 * first hash does. Linux only; elsewhere all are equal.
 */
export function lowerPoolPriority(): void {
  if (process.platform !== 'linux') return;
  try {
    for (const thread of readdirSync('/proc/self/task')) {
      const name = readFileSync(`/proc/self/task/${thread}/comm`, 'utf8');
      if (name.startsWith('libuv-worker')) setPriority(Number(thread), NICENESS);
    }
  } catch {
    // No /proc, or not allowed: slower answers under saturation, and nothing else.
  }
}
