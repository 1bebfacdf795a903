/** What the system says about processes: CPU time by thread, and memory. Linux only: it reads /proc. */
import { readdirSync, readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

const NS_PER_MS = 1e6;

/** CPU time in milliseconds since the process began. */
export interface CpuTime {
  /** JavaScript. */
  readonly main: number;
  /** libuv's pool: of a server that hashes, Argon2 and next to nothing else. */
  readonly pool: number;
  /** Garbage collection, compilation and whatever else has a thread. */
  readonly others: number;
}

export function cpuTime(pid: number): CpuTime {
  let main = 0;
  let pool = 0;
  let others = 0;
  for (const thread of readdirSync(`/proc/${pid}/task`)) {
    try {
      const directory = `/proc/${pid}/task/${thread}`;
      const ms = Number(readFileSync(`${directory}/schedstat`, 'utf8').split(' ')[0]) / NS_PER_MS;
      if (thread === String(pid)) main += ms;
      else if (readFileSync(`${directory}/comm`, 'utf8').startsWith('libuv-worker')) pool += ms;
      else others += ms;
    } catch {
      // The thread has ended since.
    }
  }
  return { main, pool, others };
}

export const cpuSince = (pid: number, { main, pool, others }: CpuTime): CpuTime => {
  const now = cpuTime(pid);
  return { main: now.main - main, pool: now.pool - pool, others: now.others - others };
};

export const total = ({ main, pool, others }: CpuTime) => main + pool + others;

const IDLE_SHARE = 0.05;
const LOOK_MS = 500;

/** Waits until a process has nothing left to do: what it was asked in vain it may still be working on. */
export async function untilIdle(pid: number): Promise<void> {
  for (let before = total(cpuTime(pid)); ; ) {
    await sleep(LOOK_MS);
    const now = total(cpuTime(pid));
    if (now - before < IDLE_SHARE * LOOK_MS) return;
    before = now;
  }
}

const MS_PER_TICK = 10;

/** CPU time of all that runs on the machine, in milliseconds since it was started. */
export function machineCpuMs(): number {
  const times = /^cpu +(.*)$/m.exec(readFileSync('/proc/stat', 'utf8'))?.[1]?.split(' ').map(Number) ?? [];
  const [user = 0, nice = 0, system = 0, , , irq = 0, softirq = 0] = times;
  return (user + nice + system + irq + softirq) * MS_PER_TICK;
}

/** Megabytes (10^6 bytes). */
export function residentMb(pid: number): number {
  const kib = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
  return (Number(kib) * 1024) / 1e6;
}

/** The most memory that a process had while `work` ran, looked at ten times a second. Megabytes. */
export async function peakResidentMb<T>(pid: number, work: () => Promise<T>): Promise<[T, number]> {
  let peak = residentMb(pid);
  const timer = setInterval(() => {
    peak = Math.max(peak, residentMb(pid));
  }, 100);
  try {
    return [await work(), peak];
  } finally {
    clearInterval(timer);
  }
}
