import { randomBytes, timingSafeEqual } from 'node:crypto';
import type { Wait } from '../call.ts';
import type { Engine } from './engine.ts';
import { type Argon2Parameters, formatArgon2, parseArgon2 } from './phc.ts';
import type { Slots } from './slots.ts';

const SALT_BYTES = 16;
const HASH_BYTES = 32;

/** What hashing is configured to. */
export interface HashSettings extends Argon2Parameters {
  /** Every pepper that a stored hash may still need, by its ID. */
  readonly peppers: ReadonlyMap<string, Buffer>;
  /** The pepper of new hashes; undefined: none. */
  readonly pepperId: string | undefined;
}

/** Makes and verifies the hashes of the column `password_hash`. Passwords come normalised. */
export class Hasher {
  readonly slots: Slots;
  readonly #engine: Engine;
  readonly #settings: HashSettings;
  readonly #formats: readonly HashFormat[];
  #nobodysHash: Promise<string> | undefined;

  /** Which engine does the work, and why that one. */
  readonly engine: string;

  constructor(engine: Engine, why: string, settings: HashSettings, slots: Slots) {
    this.#engine = engine;
    this.engine = `${engine.name} (${why})`;
    this.#settings = settings;
    this.slots = slots;
    this.#formats = [
      // Formats of imported accounts join here: what their hashes begin with, and how a password is verified.
      { prefix: '$argon2id$', verify: (stored, password) => this.#verifyArgon2(stored, password) },
    ];
  }

  /** To be called within a slot. @throws Error if the stored hash is of no known format, or its pepper is missing. */
  async verify(stored: string, password: string, wait: Wait): Promise<boolean> {
    const format = this.#formats.find(({ prefix }) => stored.startsWith(prefix));
    if (!format) throw new Error('A stored password hash is of no known format');
    return await this.#timed(wait, () => format.verify(stored, password));
  }

  /** To be called within a slot. */
  async hash(password: string, wait: Wait): Promise<string> {
    return await this.#timed(wait, () => this.#hashArgon2(password));
  }

  /** Whether a stored hash is weaker than what is configured, keyed with another pepper, or of another format. */
  needsRehash(stored: string): boolean {
    const parsed = parseArgon2(stored);
    if (!parsed) return true;
    const { memoryKib, iterations, parallelism, pepperId } = this.#settings;
    return (
      parsed.memoryKib < memoryKib ||
      parsed.iterations < iterations ||
      parsed.parallelism !== parallelism ||
      parsed.pepperId !== pepperId ||
      parsed.hash.length < HASH_BYTES
    );
  }

  /** A hash that no password has, as costly to verify as any other: for users who do not exist. */
  nobodysHash(): Promise<string> {
    this.#nobodysHash ??= this.#hashArgon2(randomBytes(32).toString('base64')).catch((error) => {
      this.#nobodysHash = undefined;
      throw error;
    });
    return this.#nobodysHash;
  }

  async #hashArgon2(password: string): Promise<string> {
    const { memoryKib, iterations, parallelism, pepperId } = this.#settings;
    const parameters = { memoryKib, iterations, parallelism };
    const salt = randomBytes(SALT_BYTES);
    const hash = await this.#engine.argon2id(password, salt, this.#pepper(pepperId), HASH_BYTES, parameters);
    return formatArgon2({ ...parameters, pepperId, salt, hash });
  }

  async #verifyArgon2(stored: string, password: string): Promise<boolean> {
    const parsed = parseArgon2(stored);
    if (!parsed) throw new Error('A stored Argon2 hash is malformed');
    const { salt, hash, pepperId } = parsed;
    const actual = await this.#engine.argon2id(password, salt, this.#pepper(pepperId), hash.length, parsed);
    return timingSafeEqual(actual, hash);
  }

  #pepper(id: string | undefined): Buffer | undefined {
    if (id === undefined) return undefined;
    const secret = this.#settings.peppers.get(id);
    if (!secret)
      throw new Error(`A stored password hash needs pepper ${JSON.stringify(id)}, which is not configured`);
    return secret;
  }

  async #timed<T>(wait: Wait, work: () => Promise<T>): Promise<T> {
    wait.throwIfOver();
    return await wait.timed('hash', work);
  }
}

interface HashFormat {
  readonly prefix: string;
  verify(stored: string, password: string): Promise<boolean>;
}
