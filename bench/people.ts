/** The made-up people of the benchmark: what the database is filled with, and what the load client knows of it. */
import { createHash } from 'node:crypto';
import mysql, { type Connection, type RowDataPacket } from 'mysql2/promise';

export const APP = 'CRM';

/** What people choose, more or less; all pass the policy, at its various costs. */
export const PASSWORDS: readonly string[] = Array.from({ length: 64 }, (_, index) => {
  const digest = createHash('sha256').update(`password ${index}`).digest();
  const word = (at: number) => WORDS[(digest[at] as number) % WORDS.length] as string;
  return [
    `${word(0)}-${word(1)}-${digest[2]}-${word(3)}`,
    `${word(0)} ${word(1)} ${word(2)} ${word(3)} ${word(4)}`,
    digest.toString('base64url').slice(0, 16),
    `${word(0)[0]?.toUpperCase()}${word(0).slice(1)}${digest.readUInt16BE(1)}!${word(3)}${digest[4]}`,
  ][index % 4] as string;
});
const WORDS =
  'harbour tulip quartz violin meadow glacier pepper anchor lantern walnut copper saddle thicket marble falcon ginger';

/** A password that the policy refuses. */
export const WEAK_PASSWORD = 'Sommer2024';

const sha256 = (text: string) => createHash('sha256').update(text).digest('hex');

/** The session token of person `n` (from 1). */
export const tokenOf = (n: number) => sha256(`session-0-${n}`);

export interface Population {
  readonly users: number;
  /** Sessions of each user, one of them live; and as many audit records. */
  readonly sessionsEach: number;
}

const ROWS_AT_ONCE = 100_000;
