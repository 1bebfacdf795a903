/** Statistics for tests of timing: whether two samples may come from one distribution. */

const TERMS = 100;
/** A difference that nobody made comes up once in a hundred times; three times in a row once in a million. */
const TRIES = 3;
const SIGNIFICANT = 0.01;

/** The probability of two samples being at least so far apart if they are of one distribution (Kolmogorov-Smirnov). */
export function kolmogorovSmirnov(first: readonly number[], second: readonly number[]): number {
  const a = first.toSorted((x, y) => x - y);
  const b = second.toSorted((x, y) => x - y);
  let distance = 0;
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    const value = Math.min(a[i] as number, b[j] as number);
    while (i < a.length && (a[i] as number) <= value) i++;
    while (j < b.length && (b[j] as number) <= value) j++;
    distance = Math.max(distance, Math.abs(i / a.length - j / b.length));
  }
  const size = Math.sqrt((a.length * b.length) / (a.length + b.length));
  const lambda = (size + 0.12 + 0.11 / size) * distance;
  let sum = 0;
  for (let k = 1; k <= TERMS; k++) sum += (k % 2 === 1 ? 2 : -2) * Math.exp(-2 * (k * lambda) ** 2);
  return lambda < 0.2 ? 1 : Math.min(1, Math.max(0, sum));
}

/**
 * Times the two kinds of work in turn, the order of each pair by lot.
 * @returns the last p; above 0.01 unless they differ, as good as always.
 */
export async function timesApart(
  pairs: number,
  first: (index: number) => Promise<unknown>,
  second: (index: number) => Promise<unknown>,
): Promise<{ p: number; isApart: boolean }> {
  let p = 0;
  for (let attempt = 0; attempt < TRIES && p <= SIGNIFICANT; attempt++) {
    const times: [number[], number[]] = [[], []];
    for (let index = 0; index < pairs; index++) {
      const order = Math.random() < 0.5 ? ([0, 1] as const) : ([1, 0] as const);
      for (const which of order) {
        const start = performance.now();
        await (which === 0 ? first : second)(index);
        times[which].push(performance.now() - start);
      }
    }
    p = kolmogorovSmirnov(...times);
  }
  return { p, isApart: p <= SIGNIFICANT };
}
