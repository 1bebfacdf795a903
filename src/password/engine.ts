import { randomBytes } from 'node:crypto';
import type { Argon2Parameters } from './phc.ts';

/** Argon2id version 19, raw: the one thing asked of an Argon2 library. Runs on the libuv pool. */
export interface Engine {
  readonly name: 'argon2' | 'node-rs';
  argon2id(
    password: string,
    salt: Buffer,
    secret: Buffer | undefined,
    length: number,
    parameters: Argon2Parameters,
  ): Promise<Buffer>;
}

const ARGON2ID = 2;
const VERSION_19 = 0x13;

/** `argon2`: the reference C implementation, and the one of record. */
async function loadArgon2(): Promise<Engine> {
  const { hash } = await import('argon2');
  return {
    name: 'argon2',
    argon2id: (password, salt, secret, hashLength, { memoryKib, iterations, parallelism }) =>
      hash(password, {
        raw: true,
        type: ARGON2ID,
        version: VERSION_19,
        salt,
        hashLength,
        memoryCost: memoryKib,
        timeCost: iterations,
        parallelism,
        ...(secret ? { secret } : {}),
      }),
  };
}

/** `@node-rs/argon2`: RustCrypto's, about twice as fast because its SIMD is chosen at run time. Optional. */
async function loadNodeRs(): Promise<Engine> {
  const { hashRaw, Algorithm, Version } = await import('@node-rs/argon2').then((module) => ({
    ...module,
    // `const enum`s leave no value behind in type-stripped code.
    Algorithm: { Argon2id: 2 },
    Version: { V0x13: 1 },
  }));
  return {
    name: 'node-rs',
    argon2id: (password, salt, secret, outputLen, { memoryKib, iterations, parallelism }) =>
      hashRaw(password, {
        algorithm: Algorithm.Argon2id,
        version: Version.V0x13,
        salt,
        outputLen,
        memoryCost: memoryKib,
        timeCost: iterations,
        parallelism,
        ...(secret ? { secret } : {}),
      }),
  };
}

/**
 * The engine that does the work. With `auto` it is the fast one where that loads and agrees with `argon2` on
 * every case of the cross-check; otherwise `argon2`, and `reason` says why.
 * @throws if `wanted` names an engine that does not load or does not agree.
 */
export async function chooseEngine(
  wanted: 'auto' | Engine['name'],
  load: { argon2: () => Promise<Engine>; nodeRs: () => Promise<Engine> } = {
    argon2: loadArgon2,
    nodeRs: loadNodeRs,
  },
): Promise<{ engine: Engine; reason: string }> {
  const reference = await load.argon2();
  if (wanted === 'argon2') return { engine: reference, reason: 'configured' };
  try {
    const fast = await load.nodeRs();
    await crossCheck(reference, fast);
    return { engine: fast, reason: 'agrees with argon2 in the start-up cross-check' };
  } catch (error) {
    const reason = `@node-rs/argon2 is not used: ${(error as Error).message.split('\n')[0]}`;
    if (wanted === 'node-rs') throw new Error(reason, { cause: error });
    return { engine: reference, reason };
  }
}

/**
 * Both must make the same bytes of the same input: then each verifies what the other made. The SIMD core of the
 * fast engine is young and is chosen by CPU, so this runs at every start; it takes some 20 ms.
 * @throws Error naming the first case in which they differ.
 */
export async function crossCheck(reference: Engine, candidate: Engine): Promise<void> {
  const cases: [Argon2Parameters, string, Buffer | undefined, number][] = [
    [{ memoryKib: 8, iterations: 1, parallelism: 1 }, '', undefined, 32],
    [{ memoryKib: 256, iterations: 3, parallelism: 1 }, 'pässwörd \u{1F511}', undefined, 32],
    [{ memoryKib: 64, iterations: 2, parallelism: 1 }, 'keyed', randomBytes(32), 32],
    [{ memoryKib: 1024, iterations: 2, parallelism: 4 }, 'a\0b', randomBytes(32), 32],
    [{ memoryKib: 1027, iterations: 2, parallelism: 3 }, 'x'.repeat(1024), randomBytes(16), 64],
    [{ memoryKib: 19_456, iterations: 2, parallelism: 1 }, 'correct horse battery staple', undefined, 32],
  ];
  for (const [parameters, password, secret, length] of cases) {
    const salt = randomBytes(16);
    const [expected, actual] = await Promise.all(
      [reference, candidate].map((engine) => engine.argon2id(password, salt, secret, length, parameters)),
    );
    if (!expected?.equals(actual as Buffer)) {
      const { memoryKib, iterations, parallelism } = parameters;
      throw new Error(
        `it disagrees with argon2 at m=${memoryKib}, t=${iterations}, p=${parallelism}, ${secret ? 'with' : 'without'} a secret`,
      );
    }
  }
}
