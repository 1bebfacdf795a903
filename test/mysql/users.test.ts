import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import {
  countOldPasswordAttempt,
  findUser,
  findUserByName,
  insertUser,
  listUsers,
  lockUser,
  normaliseUsername,
  replaceOwnPassword,
  replacePassword,
  resetOldPasswordAttempts,
  setApproval,
  setLocked,
  setSuperUser,
  upgradeHash,
} from '../../src/mysql/users.ts';
import { inTransaction, isBlocked, testBed } from './test_bed.ts';

const CONNECTIONS = 20;
const bed = await testBed({ REKEY_DATABASE_POOL_SIZE: String(CONNECTIONS) });
const { db, database, sql } = bed;
const DAY_MS = 86_400_000;

const newPassword = (hash: string) => ({
  hash,
  expiresAt: new Date('2030-01-02T03:04:05.678Z'),
  mustChange: false,
});

async function rowOf(userId: string) {
  const [row] = await sql('SELECT * FROM users WHERE user_id = ?', [userId]);
  assert.ok(row);
  return row;
}

describe('a user', () => {
  test('is found by ID and by name as it was made', async () => {
    const userId = await bed.user({
      username: 'Zoë.\u{1F511}',
      displayName: 'Zoë Käfer 日本',
      email: 'zoë@example.org',
      isSuperUser: true,
      approval: 'pending',
      passwordHash: '$argon2id$x',
      mustChange: true,
    });
    const user = await findUser(db, userId);
    assert.deepEqual(user, {
      userId,
      username: 'zoë.\u{1F511}',
      displayName: 'Zoë Käfer 日本',
      email: 'zoë@example.org',
      isSuperUser: true,
      isLocked: false,
      approval: 'pending',
      passwordHash: '$argon2id$x',
      passwordExpiresAt: null,
      passwordHasExpired: false,
      mustChange: true,
      oldPasswordAttempts: 0,
      oldPasswordAttemptsAgeMs: 0,
    });
    for (const name of ['zoë.\u{1F511}', 'ZOË.\u{1F511}', 'Zoe\u0308.\u{1F511}']) {
      assert.deepEqual(await findUserByName(db, name), user, name);
    }
  });

  test('is the same whatever SQL passes over at the end of the name, for the guard as well', async () => {
    const userId = await bed.user({ username: 'padded ' });
    for (const name of ['padded', 'padded ', 'PADDED   ']) {
      assert.equal((await findUserByName(db, name))?.userId, userId);
      assert.equal(normaliseUsername(name), 'padded');
    }
    for (const name of [' padded', 'padded\t.', 'padded\0']) {
      assert.equal(await findUserByName(db, name), undefined);
    }
  });

  test('who is not there is not found, whatever is asked for', async () => {
    for (const name of ['', 'nobody', "' OR '1'='1", 'zoe', '%', 'x'.repeat(1000), '\0']) {
      assert.equal(await findUserByName(db, name), undefined, name);
      assert.equal(await findUser(db, name), undefined, name);
    }
    assert.equal(await findUserByName(db, '日本'), undefined);
  });

  test('has a name of which there is only one, whatever its case', async () => {
    await bed.user({ username: 'Unique' });
    await assert.rejects(bed.user({ username: 'uniQUE' }), { errno: 1062 });
    await bed.user({ username: 'ünique' });
  });

  test('has a password that expires in so many days, by the clock of the database', async () => {
    const userId = await bed.user({ passwordExpiryDays: 2 });
    const [row] = await sql(
      `SELECT TIMESTAMPDIFF(MICROSECOND, password_set_at, password_expires_at) AS lifetime,
         ABS(TIMESTAMPDIFF(SECOND, password_set_at, UTC_TIMESTAMP(6))) AS age FROM users WHERE user_id = ?`,
      [userId],
    );
    assert.equal(Number(row?.lifetime), 2 * DAY_MS * 1000);
    assert.ok(Number(row?.age) < 60);
    assert.equal((await findUser(db, userId))?.passwordHasExpired, false);
    await sql('UPDATE users SET password_expires_at = UTC_TIMESTAMP(6) WHERE user_id = ?', [userId]);
    assert.equal((await findUser(db, userId))?.passwordHasExpired, true);
  });

  test('is locked, approved and promoted, and nobody else is', async () => {
    const [userId, other] = [await bed.user(), await bed.user()];
    const before = await rowOf(other);
    for (const [change, look] of [
      [() => setLocked(db, userId, true), { is_locked: 1 }],
      [() => setLocked(db, userId, true), { is_locked: 1 }],
      [() => setLocked(db, userId, false), { is_locked: 0 }],
      [() => setApproval(db, userId, 'rejected'), { approval: 'rejected' }],
      [() => setApproval(db, userId, 'approved'), { approval: 'approved' }],
      [() => setSuperUser(db, userId, true), { is_super_user: 1 }],
      [() => setSuperUser(db, userId, false), { is_super_user: 0 }],
    ] as const) {
      assert.equal(await change(), true);
      assert.partialDeepStrictEqual(await rowOf(userId), look);
    }
    assert.deepEqual(await rowOf(other), before);
    assert.equal(await setLocked(db, 'nobody', true), false);
    assert.equal(await setApproval(db, 'nobody', 'approved'), false);
    assert.equal(await setSuperUser(db, 'nobody', true), false);
  });

  test('stands in a list of pages in the order of the names', async () => {
    const page = await testBedWith(['b', 'a', 'ä', 'c', 'Z']);
    assert.deepEqual(await page('', 2), ['a', 'b']);
    assert.deepEqual(await page('b', 2), ['c', 'z']);
    assert.deepEqual(await page('z', 2), ['ä']);
    assert.deepEqual(await page('ä', 2), []);
  });
});

async function testBedWith(names: readonly string[]) {
  const own = await testBed();
  for (const username of names) await own.user({ username });
  return async (after: string, limit: number) =>
    (await listUsers(own.db, after, limit)).map(({ username }) => username);
}

describe('old passwords are counted', () => {
  const guard = { limit: 3, windowSeconds: 900 };
  const count = (userId: string) => countOldPasswordAttempt(db, userId, 'first hash', guard);
  const age = (userId: string, seconds: number) =>
    sql(
      'UPDATE users SET old_password_attempts_since = old_password_attempts_since - INTERVAL ? SECOND WHERE user_id = ?',
      [seconds, userId],
    );

  test('up to the limit, and no further', async () => {
    const [userId, other] = [await bed.user(), await bed.user()];
    assert.deepEqual(
      [
        await count(userId),
        await count(userId),
        await count(userId),
        await count(userId),
        await count(userId),
      ],
      [true, true, true, false, false],
    );
    assert.equal((await findUser(db, userId))?.oldPasswordAttempts, 3);
    assert.equal((await findUser(db, other))?.oldPasswordAttempts, 0);
  });

  test('within a window that begins with the first and does not move', async () => {
    const userId = await bed.user();
    await count(userId);
    const { old_password_attempts_since: since } = await rowOf(userId);
    await count(userId);
    assert.deepEqual((await rowOf(userId)).old_password_attempts_since, since);
    await age(userId, 100);
    const ageMs = (await findUser(db, userId))?.oldPasswordAttemptsAgeMs ?? 0;
    assert.ok(ageMs >= 100_000 && ageMs < 160_000, String(ageMs));
  });

  test('anew when the window has passed', async () => {
    const userId = await bed.user();
    for (let i = 0; i < 3; i++) await count(userId);
    await age(userId, guard.windowSeconds - 60);
    assert.equal(await count(userId), false);
    await age(userId, 61);
    assert.equal(await count(userId), true);
    const user = await findUser(db, userId);
    assert.equal(user?.oldPasswordAttempts, 1);
    assert.ok(user.oldPasswordAttemptsAgeMs < 60_000);
  });

  test('below the limit, anew as well when the window has passed', async () => {
    const userId = await bed.user();
    await count(userId);
    await age(userId, guard.windowSeconds + 1);
    await count(userId);
    assert.equal((await findUser(db, userId))?.oldPasswordAttempts, 1);
  });

  test('in parallel no more than the limit', async () => {
    const userId = await bed.user();
    const ten = { limit: 10, windowSeconds: 900 };
    const counted = await Promise.all(
      Array.from({ length: 50 }, () => countOldPasswordAttempt(db, userId, 'first hash', ten)),
    );
    assert.equal(counted.filter(Boolean).length, 10);
    assert.equal((await findUser(db, userId))?.oldPasswordAttempts, 10);
  });

  test('not for somebody who is not there, nor against a password that is not there any more', async () => {
    const userId = await bed.user();
    assert.equal(await count('nobody'), false);
    assert.equal(await countOldPasswordAttempt(db, userId, 'another hash', guard), false);
    assert.equal((await findUser(db, userId))?.oldPasswordAttempts, 0);
  });

  test('and forgotten when one has proven right, if that is still the password', async () => {
    const userId = await bed.user();
    await count(userId);
    await resetOldPasswordAttempts(db, userId, 'another hash');
    assert.equal((await findUser(db, userId))?.oldPasswordAttempts, 1);
    await resetOldPasswordAttempts(db, userId, 'first hash');
    assert.partialDeepStrictEqual(await rowOf(userId), {
      old_password_attempts: 0,
      old_password_attempts_since: null,
    });
  });
});

describe('a password is replaced', () => {
  test('with all that goes with it', async () => {
    const userId = await bed.user({ mustChange: true });
    await countOldPasswordAttempt(db, userId, 'first hash', { limit: 3, windowSeconds: 900 });
    await sql("UPDATE users SET password_set_at = '2020-01-01' WHERE user_id = ?", [userId]);
    assert.equal(await replacePassword(db, userId, 'first hash', newPassword('second')), true);
    assert.partialDeepStrictEqual(await rowOf(userId), {
      password_hash: 'second',
      password_expires_at: new Date('2030-01-02T03:04:05.678Z'),
      must_change: 0,
      old_password_attempts: 0,
      old_password_attempts_since: null,
    });
    const [row] = await sql(
      'SELECT ABS(TIMESTAMPDIFF(SECOND, password_set_at, UTC_TIMESTAMP(6))) AS age FROM users WHERE user_id = ?',
      [userId],
    );
    assert.ok(Number(row?.age) < 60);
  });

  test('on condition of the hash that was verified, or of none', async () => {
    const userId = await bed.user();
    assert.equal(await replacePassword(db, userId, 'another', newPassword('x')), false);
    assert.equal((await rowOf(userId)).password_hash, 'first hash');
    assert.equal(await replacePassword(db, userId, null, { ...newPassword('x'), expiresAt: null }), true);
    assert.partialDeepStrictEqual(await rowOf(userId), { password_hash: 'x', password_expires_at: null });
    assert.equal(await replacePassword(db, 'nobody', null, newPassword('x')), false);
  });

  test('by exactly one of twenty connections that do it at once', async () => {
    const userId = await bed.user();
    const replaced = await Promise.all(
      Array.from({ length: CONNECTIONS }, (_, index) =>
        inTransaction(database, async (tx) => {
          await tx.rows('SELECT password_hash FROM users WHERE user_id = ?', [userId]);
          return (await replacePassword(tx, userId, 'first hash', newPassword(`hash ${index}`))) && index;
        }),
      ),
    );
    const winners = replaced.filter((index) => index !== false);
    assert.equal(winners.length, 1);
    assert.equal((await rowOf(userId)).password_hash, `hash ${winners[0]}`);
  });

  test('by a stronger hash only while it is the same password', async () => {
    const userId = await bed.user();
    const { password_set_at } = await rowOf(userId);
    assert.equal(await upgradeHash(db, userId, 'another', 'stronger'), false);
    assert.equal(await upgradeHash(db, userId, 'first hash', 'stronger'), true);
    assert.partialDeepStrictEqual(await rowOf(userId), { password_hash: 'stronger', password_set_at });
  });
});

describe('the own password is replaced', () => {
  const live = async (userId: string) =>
    (
      await sql(
        'SELECT session_id FROM sessions WHERE user_id = ? AND ended_at IS NULL AND expires_at > UTC_TIMESTAMP(6) ORDER BY session_id',
        [userId],
      )
    ).map(({ session_id }) => session_id);
  const replace = (sessionId: number, hash = 'second', expected = 'first hash', asSuperUser = false) =>
    inTransaction(database, (tx) =>
      replaceOwnPassword(tx, sessionId, expected, newPassword(hash), asSuperUser),
    );

  for (const others of [0, 1, 7]) {
    test(`and the other sessions end, ${others} of them, and nobody else's`, async () => {
      const [userId, neighbour] = [await bed.user({ mustChange: true }), await bed.user()];
      const { sessionId: theirs } = await bed.session(neighbour);
      const { sessionId: before } = await bed.session(userId, -1);
      const { sessionId: ended } = await bed.session(userId);
      await sql("UPDATE sessions SET ended_at = '2020-01-01' WHERE session_id = ?", [ended]);
      const { sessionId: own } = await bed.session(userId);
      for (let i = 0; i < others; i++) await bed.session(userId);
      await countOldPasswordAttempt(db, userId, 'first hash', { limit: 3, windowSeconds: 900 });

      assert.equal(await replace(own), others);
      assert.deepEqual(await live(userId), [own]);
      assert.deepEqual(await live(neighbour), [theirs]);
      assert.partialDeepStrictEqual(await rowOf(userId), {
        password_hash: 'second',
        password_expires_at: new Date('2030-01-02T03:04:05.678Z'),
        must_change: 0,
        old_password_attempts: 0,
        old_password_attempts_since: null,
      });
      assert.equal((await rowOf(neighbour)).password_hash, 'first hash');
      const [old] = await sql('SELECT ended_at FROM sessions WHERE session_id = ?', [ended]);
      assert.deepEqual(old?.ended_at, new Date('2020-01-01T00:00:00Z'));
      const [expired] = await sql('SELECT ended_at FROM sessions WHERE session_id = ?', [before]);
      assert.equal(expired?.ended_at, null);
    });
  }

  for (const [why, spoil] of [
    ['another password', "UPDATE users SET password_hash = 'other' WHERE user_id = ?"],
    ['a lock', 'UPDATE users SET is_locked = 1 WHERE user_id = ?'],
    ['an account that was rejected', "UPDATE users SET approval = 'rejected' WHERE user_id = ?"],
    ['a session that has ended', 'UPDATE sessions SET ended_at = UTC_TIMESTAMP(6) WHERE user_id = ?'],
    [
      'a session that has expired',
      'UPDATE sessions SET expires_at = UTC_TIMESTAMP(6) - INTERVAL 1 SECOND WHERE user_id = ?',
    ],
  ] as const) {
    test(`not in spite of ${why}, and then nothing changes`, async () => {
      const userId = await bed.user();
      const { sessionId } = await bed.session(userId);
      await bed.session(userId);
      await sql(spoil, [userId]);
      const before = [await rowOf(userId), await live(userId)];
      assert.equal(await replace(sessionId), undefined);
      assert.deepEqual([await rowOf(userId), await live(userId)], before);
    });
  }

  test("with a super-user's options only by a super-user", async () => {
    const userId = await bed.user();
    const { sessionId } = await bed.session(userId);
    assert.equal(await replace(sessionId, 'second', 'first hash', true), undefined);
    await setSuperUser(db, userId, true);
    assert.equal(await replace(sessionId, 'second', 'first hash', true), 0);
  });

  test('not through a session that never was', async () => {
    assert.equal(await replace(999_999_999), undefined);
  });

  test('by exactly one of twenty sessions that do it at once, and the others are over', async () => {
    const userId = await bed.user();
    const sessions: number[] = [];
    for (let i = 0; i < CONNECTIONS; i++) sessions.push((await bed.session(userId)).sessionId);
    const ended = await Promise.all(sessions.map((own, index) => replace(own, `hash ${index}`)));
    const winners = ended.flatMap((count, index) => (count === undefined ? [] : [index]));
    assert.equal(winners.length, 1);
    const [winner = -1] = winners;
    assert.equal(ended[winner], CONNECTIONS - 1);
    assert.deepEqual(await live(userId), [sessions[winner]]);
    assert.equal((await rowOf(userId)).password_hash, `hash ${winner}`);
  });

  test('and until the transaction ends nobody can end that session, lock that user or open another', async () => {
    const userId = await bed.user();
    const { sessionId } = await bed.session(userId);
    let blocked: Promise<unknown>[] = [];
    await inTransaction(database, async (tx) => {
      assert.equal(await replaceOwnPassword(tx, sessionId, 'first hash', newPassword('second'), false), 0);
      blocked = [
        db.write('UPDATE sessions SET ended_at = UTC_TIMESTAMP(6) WHERE session_id = ?', [sessionId]),
        setLocked(db, userId, true),
        bed.session(userId),
      ];
      for (const work of blocked) assert.ok(await isBlocked(work));
    });
    await Promise.all(blocked);
  });
});

test('a user who is locked for a transaction stays as read until that ends', async () => {
  const userId = await bed.user();
  let change: Promise<unknown> = Promise.resolve();
  await inTransaction(database, async (tx) => {
    const locked = await lockUser(tx, userId);
    assert.equal(locked?.user.userId, userId);
    assert.ok(Math.abs((locked?.now.getTime() ?? 0) - Date.now()) < 60_000);
    change = setSuperUser(db, userId, true);
    assert.ok(await isBlocked(change));
    assert.equal((await lockUser(tx, userId))?.user.isSuperUser, false);
  });
  await change;
  assert.equal((await findUser(db, userId))?.isSuperUser, true);
  assert.equal(await inTransaction(database, (tx) => lockUser(tx, 'nobody')), undefined);
});

test('nothing that is too long is cut short in silence', async () => {
  const user = {
    username: 'too.long',
    displayName: '',
    email: '',
    isSuperUser: false,
    approval: 'approved' as const,
    passwordHash: 'x',
    passwordExpiryDays: 0,
    mustChange: false,
  };
  for (const field of ['username', 'displayName', 'email', 'passwordHash']) {
    await assert.rejects(insertUser(db, { ...user, [field]: 'x'.repeat(600) }), { errno: 1406 }, field);
  }
  await assert.rejects(
    insertUser(db, { ...user, passwordHash: 'ä' }),
    /Incorrect string value|Cannot convert|Conversion from/,
  );
});
