import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { describe, test } from 'node:test';
import { hash as argon2Hash, verify as argon2Verify } from 'argon2';
import { chooseEngine, crossCheck, type Engine } from '../../src/password/engine.ts';
import { type Argon2Parameters, formatArgon2 } from '../../src/password/phc.ts';

const { engine: reference } = await chooseEngine('argon2');
const { engine: fast, reason: fastReason } = await chooseEngine('auto');
const withoutFast = fast.name === 'node-rs' ? false : fastReason;

type Case = Parameters<Engine['argon2id']>;

/** An engine that is right but where `lies` says otherwise. */
const liar = (lies: (...call: Case) => boolean): Engine => ({
  name: 'node-rs',
  argon2id: async (...call) => {
    const bytes = await reference.argon2id(...call);
    if (lies(...call)) bytes[bytes.length - 1] = (bytes.at(-1) as number) ^ 1;
    return bytes;
  },
});

describe('both engines', () => {
  /** Version 19, from `src/test.c` of the reference implementation, https://github.com/P-H-C/phc-winner-argon2. */
  const vectors: [password: string, salt: string, m: number, t: number, p: number, hex: string][] = [
    ['password', 'somesalt', 65536, 2, 1, '09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7'],
    ['password', 'somesalt', 256, 2, 1, '9dfeb910e80bad0311fee20f9c0e2b12c17987b4cac90c2ef54d5b3021c68bfe'],
    ['password', 'somesalt', 256, 2, 2, '6d093c501fd5999645e0ea3bf620d7b8be7fd2db59c20d9fff9539da2bf57037'],
    ['password', 'somesalt', 65536, 1, 1, 'f6a5adc1ba723dddef9b5ac1d464e180fcd9dffc9d1cbf76cca2fed795d9ca98'],
    ['password', 'somesalt', 65536, 4, 1, '9025d48e68ef7395cca9079da4c4ec3affb3c8911fe4f86d1a2520856f63172c'],
    [
      'differentpassword',
      'somesalt',
      65536,
      2,
      1,
      '0b84d652cf6b0c4beaef0dfe278ba6a80df6696281d7e0d2891b817d8c458fde',
    ],
    ['password', 'diffsalt', 65536, 2, 1, 'bdf32b05ccc42eb15d58fd19b1f856b113da1e9a5874fdcc544308565aa8141c'],
  ];

  for (const engine of new Set([reference, fast])) {
    for (const [password, salt, memoryKib, iterations, parallelism, hex] of vectors) {
      test(`${engine.name} makes the known answer for ${password}, ${salt}, m=${memoryKib}, t=${iterations}, p=${parallelism}`, async () => {
        const parameters = { memoryKib, iterations, parallelism };
        const bytes = await engine.argon2id(password, Buffer.from(salt), undefined, 32, parameters);
        assert.equal(bytes.toString('hex'), hex);
      });
    }
  }

  test('each verifies what the other made, keyed or not, in one lane or several', {
    skip: withoutFast,
  }, async () => {
    for (const parallelism of [1, 2, 4]) {
      for (const secret of [undefined, randomBytes(16), randomBytes(64)]) {
        for (const password of ['', 'a\0b', 'Zürich \u{1F511}', 'x'.repeat(1024)]) {
          const parameters: Argon2Parameters = { memoryKib: 64, iterations: 2, parallelism };
          const salt = randomBytes(16);
          const [one, other] = await Promise.all(
            [reference, fast].map((engine) => engine.argon2id(password, salt, secret, 32, parameters)),
          );
          assert.deepEqual(one, other);
          const phc = formatArgon2({ ...parameters, pepperId: undefined, salt, hash: other as Buffer });
          assert.ok(await argon2Verify(phc, password, secret ? { secret } : {}));
          assert.ok(!(await argon2Verify(phc, `${password}x`, secret ? { secret } : {})));
        }
      }
    }
  });

  test('what the library itself encodes comes out the same', async () => {
    const salt = randomBytes(16);
    const phc = await argon2Hash('password', { salt, memoryCost: 64, timeCost: 2, parallelism: 2, type: 2 });
    const parameters = { memoryKib: 64, iterations: 2, parallelism: 2 };
    const hash = await fast.argon2id('password', salt, undefined, 32, parameters);
    assert.equal(formatArgon2({ ...parameters, pepperId: undefined, salt, hash }), phc);
  });
});

describe('the cross-check', () => {
  test('passes an engine that is right', async () => {
    await crossCheck(
      reference,
      liar(() => false),
    );
  });

  for (const [where, lies] of [
    ['everywhere', () => true],
    ['with several lanes', (_password, _salt, _secret, _length, { parallelism }) => parallelism > 1],
    ['with one lane', (_password, _salt, _secret, _length, { parallelism }) => parallelism === 1],
    ['with a secret', (_password, _salt, secret) => secret !== undefined],
    ['without a secret', (_password, _salt, secret) => secret === undefined],
    [
      'with a secret in one lane',
      (_password, _salt, secret, _length, { parallelism }) => secret !== undefined && parallelism === 1,
    ],
    [
      'with a secret in several lanes',
      (_password, _salt, secret, _length, { parallelism }) => secret !== undefined && parallelism > 1,
    ],
    ['with several passes', (_password, _salt, _secret, _length, { iterations }) => iterations > 1],
    ['with one pass', (_password, _salt, _secret, _length, { iterations }) => iterations === 1],
    [
      'in memory that the lanes do not divide',
      (_password, _salt, _secret, _length, { memoryKib, parallelism }) => memoryKib % (4 * parallelism) > 0,
    ],
    ['with the default memory', (_password, _salt, _secret, _length, { memoryKib }) => memoryKib === 19_456],
    ['with a NUL in the password', (password) => password.includes('\0')],
    ['beyond ASCII', (password) => /[^\0-\x7f]/.test(password)],
    ['with an empty password', (password) => password === ''],
    ['with a long password', (password) => password.length > 500],
    ['with a longer hash', (_password, _salt, _secret, length) => length > 32],
  ] as [string, (...call: Case) => boolean][]) {
    test(`catches an engine that is wrong ${where}`, async () => {
      await assert.rejects(
        crossCheck(reference, liar(lies)),
        /it disagrees with argon2 at m=\d+, t=\d+, p=\d+/,
      );
    });
  }
});

describe('the choice of the engine', () => {
  const load = (nodeRs: () => Promise<Engine>) => ({ argon2: async () => reference, nodeRs });

  test('the fast one does the work where it agrees', async () => {
    const candidate = liar(() => false);
    for (const wanted of ['auto', 'node-rs'] as const) {
      const { engine, reason } = await chooseEngine(
        wanted,
        load(async () => candidate),
      );
      assert.equal(engine, candidate);
      assert.match(reason, /agrees/);
    }
  });

  test('argon2 does the work where the fast one is missing, and the reason says so', async () => {
    const missing = load(async () => {
      throw new Error("Cannot find module '@node-rs/argon2'\nRequire stack: secret paths");
    });
    const { engine, reason } = await chooseEngine('auto', missing);
    assert.equal(engine, reference);
    assert.equal(reason, "@node-rs/argon2 is not used: Cannot find module '@node-rs/argon2'");
    await assert.rejects(chooseEngine('node-rs', missing), /is not used: Cannot find module/);
  });

  test('argon2 does the work where the fast one is wrong or throws, and the reason says so', async () => {
    const wrong = load(async () => liar(() => true));
    const { engine, reason } = await chooseEngine('auto', wrong);
    assert.equal(engine, reference);
    assert.match(reason, /disagrees/);
    await assert.rejects(chooseEngine('node-rs', wrong), /disagrees/);

    const throwing = load(async () => ({
      name: 'node-rs',
      argon2id: () => Promise.reject(new Error('no SIMD')),
    }));
    assert.equal((await chooseEngine('auto', throwing)).engine, reference);
  });

  test('whoever asks for argon2 gets it without the other being touched', async () => {
    const { engine, reason } = await chooseEngine('argon2', load(assert.fail));
    assert.equal(engine, reference);
    assert.equal(reason, 'configured');
  });

  test('without argon2 itself there is no engine', async () => {
    const broken = { argon2: () => Promise.reject(new Error('not built')), nodeRs: async () => fast };
    await assert.rejects(chooseEngine('auto', broken), /not built/);
  });
});
