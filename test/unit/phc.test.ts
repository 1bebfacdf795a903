import assert from 'node:assert/strict';
import { test } from 'node:test';
import { formatArgon2, parseArgon2 } from '../../src/password/phc.ts';

const salt = Buffer.from('0123456789abcdef');
const hash = Buffer.alloc(32, 0xf7);
const parameters = { memoryKib: 19_456, iterations: 2, parallelism: 1 };
const text = `$argon2id$v=19$m=19456,t=2,p=1$MDEyMzQ1Njc4OWFiY2RlZg$${hash.toString('base64').replace('=', '')}`;

test('parameters are written in the order m, t, p, and base64 without padding', () => {
  assert.equal(formatArgon2({ ...parameters, pepperId: undefined, salt, hash }), text);
});

test('the ID of a pepper stands as keyid, in base64', () => {
  assert.match(
    formatArgon2({ ...parameters, pepperId: '2026-a', salt, hash }),
    /^\$argon2id\$v=19\$m=19456,t=2,p=1,keyid=MjAyNi1h\$/,
  );
});

test('what was written is read back as it was', () => {
  for (const pepperId of [undefined, 'k', 'a-key_ID-of-thirty-two-characters'.slice(0, 32)]) {
    for (const memoryKib of [8, 4_194_304]) {
      for (const parallelism of [1, 255]) {
        for (const length of [12, 32, 64]) {
          const value = {
            memoryKib,
            iterations: 3,
            parallelism,
            pepperId,
            salt: Buffer.alloc(16, length),
            hash: Buffer.alloc(length, 7),
          };
          assert.deepEqual(parseArgon2(formatArgon2(value)), value);
        }
      }
    }
  }
});

test('whatever is not an Argon2id string of version 19 is refused', () => {
  const [, , , , saltText = '', hashText = ''] = text.split('$');
  for (const malformed of [
    '',
    text.slice(1),
    ` ${text}`,
    `${text} `,
    `${text}\n`,
    text.replace('argon2id', 'argon2i'),
    text.replace('argon2id', 'ARGON2ID'),
    text.replace('v=19', 'v=16'),
    text.replace('v=19$', ''),
    text.replace('m=19456,t=2,p=1', 'm=19456,p=1,t=2'),
    text.replace('m=19456,t=2,p=1', 'm=19456,t=2'),
    text.replace('m=19456', 'm=-1'),
    text.replace('m=19456', 'm=19456.5'),
    text.replace('m=19456', 'm=99999999999'),
    text.replace('t=2', 't='),
    text.replace('p=1', 'p=1000'),
    text.replace('p=1', 'p=1,data=AAAA'),
    text.replace('p=1', 'p=1,keyid='),
    text.replace(saltText, ''),
    text.replace(saltText, 'short'),
    text.replace(saltText, 'has*others!MDEyMzQ1'),
    text.replace(hashText, ''),
    text.replace(hashText, 'AAAA'),
    text.replace(hashText, `${hashText}=`),
    text.replace(hashText, 'A'.repeat(173)),
    `${text}$more`,
  ]) {
    assert.equal(parseArgon2(malformed), undefined, JSON.stringify(malformed));
  }
});
