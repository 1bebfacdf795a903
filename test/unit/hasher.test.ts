import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { describe, test } from 'node:test';
import { Wait } from '../../src/call.ts';
import { chooseEngine, type Engine } from '../../src/password/engine.ts';
import { Hasher, type HashSettings } from '../../src/password/hasher.ts';
import { formatArgon2, parseArgon2 } from '../../src/password/phc.ts';
import { Slots } from '../../src/password/slots.ts';

const { engine } = await chooseEngine('auto');
const wait = Wait.forMs(60_000);
const cheap: HashSettings = {
  memoryKib: 64,
  iterations: 2,
  parallelism: 1,
  peppers: new Map(),
  pepperId: undefined,
};
const peppers = new Map([
  ['old', randomBytes(32)],
  ['new', randomBytes(32)],
]);

const hasherWith = (settings: Partial<HashSettings> = {}, withEngine: Engine = engine) =>
  new Hasher(withEngine, 'for a test', { ...cheap, ...settings }, new Slots(2, 10, 1));

describe('a hash', () => {
  test('verifies its password and no other, however close', async () => {
    const hasher = hasherWith();
    for (const password of ['correct horse', 'Zürich \u{1F511}', 'a\0b', 'x'.repeat(256)]) {
      const stored = await hasher.hash(password, wait);
      assert.ok(await hasher.verify(stored, password, wait));
      const others = [`${password} `, ` ${password}`, password.slice(0, -1), `${password}\0`];
      for (const other of [...others, `${password.slice(0, -1)}\u{1F512}`]) {
        assert.ok(!(await hasher.verify(stored, other, wait)), JSON.stringify(other));
      }
    }
  });

  test('is of the configured parameters, 16 bytes of salt and 32 of hash', async () => {
    const parsed = parseArgon2(
      await hasherWith({ memoryKib: 96, iterations: 3, parallelism: 2 }).hash('x', wait),
    );
    assert.ok(parsed);
    assert.deepEqual([parsed.memoryKib, parsed.iterations, parsed.parallelism], [96, 3, 2]);
    assert.deepEqual([parsed.salt.length, parsed.hash.length], [16, 32]);
  });

  test('has a salt of its own each time', async () => {
    const hasher = hasherWith();
    const stored = await Promise.all(Array.from({ length: 50 }, () => hasher.hash('same', wait)));
    assert.equal(new Set(stored.map((each) => parseArgon2(each)?.salt.toString('hex'))).size, 50);
  });

  test('made with other parameters still verifies', async () => {
    const stored = await hasherWith({ memoryKib: 128, iterations: 1, parallelism: 3 }).hash('old one', wait);
    assert.ok(await hasherWith().verify(stored, 'old one', wait));
    assert.ok(!(await hasherWith().verify(stored, 'old two', wait)));
  });

  test('counts the time it took for the call', async () => {
    const own = Wait.forMs(60_000);
    const hasher = hasherWith({ memoryKib: 4096 });
    await hasher.verify(await hasher.hash('x', own), 'x', own);
    assert.ok(own.spent.hash > 0);
  });

  test('is not made for a call that nobody waits for', async () => {
    const lazy: Engine = { name: 'argon2', argon2id: assert.fail };
    const over = new Wait(AbortSignal.abort(), performance.now() + 1000);
    await assert.rejects(hasherWith({}, lazy).hash('x', over), { reason: 'CANCELLED' });
    await assert.rejects(hasherWith({}, lazy).verify('$argon2id$', 'x', over), { reason: 'CANCELLED' });
  });
});

describe('peppers', () => {
  test('a keyed hash names its key and verifies with that one only', async () => {
    const stored = await hasherWith({ peppers, pepperId: 'old' }).hash('secret', wait);
    assert.equal(parseArgon2(stored)?.pepperId, 'old');
    assert.ok(await hasherWith({ peppers }).verify(stored, 'secret', wait));
    const exchanged = new Map([['old', peppers.get('new') as Buffer]]);
    assert.ok(!(await hasherWith({ peppers: exchanged }).verify(stored, 'secret', wait)));
  });

  test('after a rotation old hashes verify, new ones have the new key, and the old ones are due for it', async () => {
    const before = await hasherWith({ peppers, pepperId: 'old' }).hash('secret', wait);
    const rotated = hasherWith({ peppers, pepperId: 'new' });
    assert.ok(await rotated.verify(before, 'secret', wait));
    assert.ok(rotated.needsRehash(before));
    const after = await rotated.hash('secret', wait);
    assert.equal(parseArgon2(after)?.pepperId, 'new');
    assert.ok(!rotated.needsRehash(after));
  });

  test('hashes without a pepper verify once there is one, and are due for it; and the other way round', async () => {
    const plain = await hasherWith({ peppers }).hash('secret', wait);
    const keyed = await hasherWith({ peppers, pepperId: 'new' }).hash('secret', wait);
    assert.ok(await hasherWith({ peppers, pepperId: 'new' }).verify(plain, 'secret', wait));
    assert.ok(hasherWith({ peppers, pepperId: 'new' }).needsRehash(plain));
    assert.ok(hasherWith({ peppers }).needsRehash(keyed));
  });

  test('a hash whose pepper is missing is an error, not a wrong password', async () => {
    const stored = await hasherWith({ peppers, pepperId: 'old' }).hash('secret', wait);
    await assert.rejects(
      hasherWith().verify(stored, 'secret', wait),
      /needs pepper "old", which is not configured/,
    );
    await assert.rejects(hasherWith({ pepperId: 'gone' }).hash('secret', wait), /needs pepper "gone"/);
  });
});

describe('a stored hash needs to be made anew', () => {
  const salt = Buffer.alloc(16);
  const stored = (parameters: Partial<Parameters<typeof formatArgon2>[0]>) =>
    formatArgon2({ ...cheap, salt, hash: Buffer.alloc(32), ...parameters });
  const hasher = hasherWith();

  for (const [why, parameters, needs] of [
    ['as configured', {}, false],
    ['with less memory', { memoryKib: 63 }, true],
    ['with fewer passes', { iterations: 1 }, true],
    ['with other lanes', { parallelism: 2 }, true],
    ['with a pepper that is not wanted', { pepperId: 'old' }, true],
    ['with a shorter hash', { hash: Buffer.alloc(24) }, true],
    ['with more memory', { memoryKib: 65 }, false],
    ['with more passes', { iterations: 3 }, false],
    ['with a longer hash', { hash: Buffer.alloc(64) }, false],
  ] as const) {
    test(`${why}: ${needs ? 'yes' : 'no'}`, () =>
      assert.equal(hasher.needsRehash(stored(parameters)), needs));
  }

  test('of another format: yes', () => {
    assert.ok(hasher.needsRehash('$2b$12$abcdefghijklmnopqrstuv'));
    assert.ok(hasher.needsRehash(''));
  });
});

describe('what is stored', () => {
  test('of an unknown format is an error that does not repeat it', async () => {
    for (const stored of ['$2b$12$canary', 'canary', '', '$argon2i$v=19$m=64,t=2,p=1$c2FsdHNhbHQ$canary']) {
      await assert.rejects(hasherWith().verify(stored, 'x', wait), (error: Error) => {
        assert.match(error.message, /is of no known format/);
        return !error.message.includes('canary');
      });
    }
  });

  test('malformed is an error that does not repeat it', async () => {
    await assert.rejects(hasherWith().verify('$argon2id$canary', 'x', wait), (error: Error) => {
      assert.match(error.message, /malformed/);
      return !error.message.includes('canary');
    });
  });
});

describe("nobody's hash", () => {
  test('is as costly as any other, made once, and no password has it', async () => {
    const hasher = hasherWith({ peppers, pepperId: 'new' });
    const stored = await hasher.nobodysHash();
    assert.equal(await hasher.nobodysHash(), stored);
    assert.ok(!hasher.needsRehash(stored));
    assert.ok(!(await hasher.verify(stored, '', wait)));
  });

  test('is tried again after it could not be made', async () => {
    let fails = true;
    const flaky: Engine = {
      name: 'argon2',
      argon2id: (...call) => (fails ? Promise.reject(new Error('no memory')) : engine.argon2id(...call)),
    };
    const hasher = hasherWith({}, flaky);
    await assert.rejects(hasher.nobodysHash(), /no memory/);
    fails = false;
    assert.match(await hasher.nobodysHash(), /^\$argon2id\$/);
  });
});

test('the hasher tells which engine works and why', () => {
  assert.equal(hasherWith().engine, `${engine.name} (for a test)`);
});
