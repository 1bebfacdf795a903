/**
 * Argon2 hashes as PHC strings, `$argon2id$v=19$m=19456,t=2,p=1[,keyid=…]$salt$hash`, parameters in the order of
 * the specification, which libargon2 insists on.
 * @see https://github.com/P-H-C/phc-string-format/blob/master/phc-sf-spec.md
 */

export interface Argon2Parameters {
  readonly memoryKib: number;
  readonly iterations: number;
  readonly parallelism: number;
}

export interface Argon2Hash extends Argon2Parameters {
  /** ID of the pepper that went in; undefined: none did. */
  readonly pepperId: string | undefined;
  readonly salt: Buffer;
  readonly hash: Buffer;
}

const ARGON2ID =
  /^\$argon2id\$v=19\$m=(\d{1,10}),t=(\d{1,10}),p=(\d{1,3})(?:,keyid=([A-Za-z0-9+/]{1,44}))?\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{16,172})$/;

const base64 = (bytes: Buffer) => bytes.toString('base64').replaceAll('=', '');

export function formatArgon2(value: Argon2Hash): string {
  const keyId = value.pepperId === undefined ? '' : `,keyid=${base64(Buffer.from(value.pepperId))}`;
  const parameters = `m=${value.memoryKib},t=${value.iterations},p=${value.parallelism}${keyId}`;
  return `$argon2id$v=19$${parameters}$${base64(value.salt)}$${base64(value.hash)}`;
}

/** @returns undefined if `phc` is not an Argon2id version 19 string in the specification's order. */
export function parseArgon2(phc: string): Argon2Hash | undefined {
  const match = ARGON2ID.exec(phc);
  if (!match) return undefined;
  const [, m, t, p, keyId, salt, hash] = match;
  return {
    memoryKib: Number(m),
    iterations: Number(t),
    parallelism: Number(p),
    pepperId: keyId === undefined ? undefined : Buffer.from(keyId, 'base64').toString(),
    salt: Buffer.from(salt as string, 'base64'),
    hash: Buffer.from(hash as string, 'base64'),
  };
}
