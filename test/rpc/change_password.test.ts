import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { after, before, describe, it } from 'node:test';
import { create, toBinary } from '@bufbuild/protobuf';
import { timestampDate } from '@bufbuild/protobuf/wkt';
import { ChangePasswordRequestSchema } from '../../gen/rekey/v1/user_service_pb.ts';
import { Wait } from '../../src/call.ts';
import { loadConfig } from '../../src/config.ts';
import { createHasher } from '../../src/server.ts';
import { framed, rawCall, rawConnect } from '../support/raw_http2.ts';
import {
  type Answer,
  type ChangeMessage,
  eventually,
  type ServerProcess,
  type Service,
  startService,
  strongPassword,
  type TestUser,
} from '../support/service.ts';
import { timesApart } from '../support/statistics.ts';

const DAY_MS = 86_400_000;

let service: Service;
before(async () => {
  service = await startService({}, { servers: 3 });
});
after(() => service.stop());

/** From CRM, by the first server. */
const change = (
  user: { ust: string },
  message: ChangeMessage,
  metadata: Record<string, string> = {},
  server: ServerProcess = service.server,
) => server.change({ ust: user.ust, app: 'CRM', ...metadata }, message);

const assertOk = (answer: Answer) => assert.equal(`${answer.code} ${answer.reason}`, 'OK ');
const assertRefused = (answer: Answer, reason: string) => assert.equal(answer.reason, reason);

const isLive = async (ust: string) =>
  (await change({ ust }, { newPassword: 'short' })).code !== 'UNAUTHENTICATED';

async function stored(userId: string) {
  const [row] = await service.sql('SELECT * FROM users WHERE user_id = ?', [userId]);
  return row as Record<string, unknown>;
}

const databaseNow = async (): Promise<Date> => (await service.sql('SELECT UTC_TIMESTAMP(6) AS now'))[0]?.now;

describe('what a change does to sessions', () => {
  it("ends one's other sessions and keeps the one it came through", async () => {
    const me = await service.createUser();
    const others = [
      await service.openSession(me.userId),
      await service.openSession(me.userId, { app: 'ERP' }),
    ];
    const expired = await service.openSession(me.userId, { lifetimeSeconds: -60 });
    const stranger = await service.createUser();

    const answer = await change(me, { oldPassword: me.password, newPassword: strongPassword() });

    assertOk(answer);
    assert.equal(answer.response?.sessionsEnded, others.length);
    assert.ok(await isLive(me.ust));
    for (const ust of [...others, expired]) assert.ok(!(await isLive(ust)));
    assert.ok(await isLive(stranger.ust));
  });

  it("ends all of somebody's sessions if a super-user makes it", async () => {
    const boss = await service.createUser({ isSuperUser: true });
    const other = await service.createUser();
    const second = await service.openSession(other.userId);

    const answer = await change(boss, { userId: other.userId, newPassword: strongPassword() });

    assertOk(answer);
    assert.equal(answer.response?.sessionsEnded, 2);
    assert.ok(!(await isLive(other.ust)));
    assert.ok(!(await isLive(second)));
    assert.ok(await isLive(boss.ust));
  });

  it("keeps a super-user's session at the own change, and takes effect on every server", async () => {
    const boss = await service.createUser({ isSuperUser: true });
    const second = await service.openSession(boss.userId);
    const newPassword = strongPassword();
    const message = { userId: boss.userId, oldPassword: boss.password, newPassword };
    assert.equal((await change(boss, message)).response?.sessionsEnded, 1);
    for (const server of service.servers) {
      assertRefused(await change({ ust: second }, { newPassword: 'x' }, {}, server), 'SESSION_INVALID');
      const again = { oldPassword: newPassword, newPassword: strongPassword(), validateOnly: true };
      assertOk(await change(boss, again, {}, server));
    }
  });
});

describe('when a new password expires', () => {
  async function expiresInDays(days: number, work: () => Promise<Answer>, userId: string): Promise<void> {
    const before = await databaseNow();
    const answer = await work();
    const after = await databaseNow();
    assertOk(answer);
    const at = answer.response?.passwordExpiryTime;
    assert.ok(at);
    const shift = days * DAY_MS;
    assert.ok(timestampDate(at).getTime() >= before.getTime() - 1 + shift);
    assert.ok(timestampDate(at).getTime() <= after.getTime() + shift);
    const { password_expires_at } = await stored(userId);
    assert.equal((password_expires_at as Date).getTime(), timestampDate(at).getTime());
  }

  it('is in 730 days if nobody says otherwise', async () => {
    const me = await service.createUser();
    const message = { oldPassword: me.password, newPassword: strongPassword() };
    await expiresInDays(730, () => change(me, message), me.userId);
  });

  for (const days of [1, 36_500]) {
    it(`is in ${days} days if a super-user says so`, async () => {
      const boss = await service.createUser({ isSuperUser: true });
      const other = await service.createUser();
      const message = { userId: other.userId, newPassword: strongPassword(), passwordExpiry: days };
      await expiresInDays(days, () => change(boss, message), other.userId);
    });
  }

  it('is never if the configuration says 0 days', async () => {
    const server = await service.startServer({ REKEY_POLICY_EXPIRY_DAYS: '0' });
    await server.waitForHealth('SERVING');
    const me = await service.createUser();
    const answer = await change(me, { oldPassword: me.password, newPassword: strongPassword() }, {}, server);
    assertOk(answer);
    assert.equal(answer.response?.passwordExpiryTime, undefined);
    assert.equal((await stored(me.userId)).password_expires_at, null);
    await server.stop();
  });

  it('is told by validate_only, and nothing is changed but the count', async () => {
    const me = await service.createUser({ mustChange: true });
    const second = await service.openSession(me.userId);
    assertRefused(
      await change(me, { oldPassword: strongPassword(), newPassword: strongPassword(), validateOnly: true }),
      'OLD_PASSWORD_MISMATCH',
    );
    assert.equal((await stored(me.userId)).old_password_attempts, 1);
    const before = await stored(me.userId);
    const answer = await change(me, {
      oldPassword: me.password,
      newPassword: strongPassword(),
      validateOnly: true,
    });
    assertOk(answer);
    assert.equal(answer.response?.sessionsEnded, 1);
    assert.ok(answer.response?.passwordExpiryTime);
    assert.deepEqual(await stored(me.userId), {
      ...before,
      old_password_attempts: 0,
      old_password_attempts_since: null,
    });
    assert.ok(await isLive(second));
  });
});

describe('must_change', () => {
  it('is cleared by the own change', async () => {
    const me = await service.createUser({ mustChange: true });
    assertOk(await change(me, { oldPassword: me.password, newPassword: strongPassword() }));
    assert.equal((await stored(me.userId)).must_change, 0);
  });

  it('is set as a super-user asks, for others and for oneself, and off otherwise', async () => {
    const boss = await service.createUser({ isSuperUser: true });
    const other = await service.createUser({ mustChange: true });
    const flagAfter = async (message: Omit<ChangeMessage, 'newPassword'>, userId = other.userId) => {
      assertOk(await change(boss, { ...message, newPassword: strongPassword() }));
      return (await stored(userId)).must_change;
    };
    assert.equal(await flagAfter({ userId: other.userId, mustChange: true }), 1);
    assert.equal(await flagAfter({ userId: other.userId }), 0);
    assert.equal(await flagAfter({ userId: other.userId, mustChange: false }), 0);
    assert.equal(await flagAfter({ oldPassword: boss.password, mustChange: true }, boss.userId), 1);
  });

  it('is as configured where a super-user does not say', async () => {
    const server = await service.startServer({ REKEY_POLICY_MUST_CHANGE_AFTER_SUPER_USER: 'true' });
    await server.waitForHealth('SERVING');
    const boss = await service.createUser({ isSuperUser: true });
    const other = await service.createUser();
    const set = async (user: TestUser, message: ChangeMessage) => {
      assertOk(await change(boss, message, {}, server));
      return (await stored(user.userId)).must_change;
    };
    assert.equal(await set(other, { userId: other.userId, newPassword: strongPassword() }), 1);
    assert.equal(
      await set(other, { userId: other.userId, newPassword: strongPassword(), mustChange: false }),
      0,
    );
    assert.equal(await set(boss, { oldPassword: boss.password, newPassword: strongPassword() }), 0);
    await server.stop();
  });
});

describe('a password is taken as it is', () => {
  /** Sets `password` and tells which of `others` pass for it. */
  async function passingFor(password: string, others: readonly string[]): Promise<string[]> {
    const me = await service.createUser();
    assertOk(await change(me, { oldPassword: me.password, newPassword: password }));
    const passing = [];
    for (const other of others) {
      const message = { oldPassword: other, newPassword: strongPassword(), validateOnly: true };
      const answer = await change(me, message);
      if (answer.code === 'OK') passing.push(other);
      else assertRefused(answer, 'OLD_PASSWORD_MISMATCH');
    }
    return passing;
  }

  it('but for NFC: composed and decomposed are the same', async () => {
    const composed = 'Kr\u00E4he-\u00E9t\u00E9-\uAC01-Vq7!'.normalize('NFC');
    const decomposed = composed.normalize('NFD');
    assert.notEqual(composed, decomposed);
    assert.deepEqual(await passingFor(decomposed, [composed, decomposed]), [composed, decomposed]);
    assert.deepEqual(await passingFor(composed, [composed, decomposed]), [composed, decomposed]);

    const me = await service.createUser({ password: decomposed });
    const answer = await change(me, { oldPassword: decomposed, newPassword: composed });
    assert.deepEqual(answer.violations, ['new_password SAME_AS_OLD']);
  });

  const ascii64 = `${'Kq7#vT2!'.repeat(7)}zW9$mR4%`;
  const unicode64 = [...'🦊🎷🧊🪐🍋🧵🛶ŻÄ中한ñ¿Ωж٣'].join('').repeat(4);
  const longest = `${'Kq7#vT2!'.repeat(31)}zW9$mR4%`;
  const longestUnicode = [...'🦊🎷🧊🪐🍋🧵🛶🧿'].join('').repeat(32);
  const near: [string, string, string[]][] = [
    [
      '64 ASCII characters, the last of which counts',
      ascii64,
      [`${ascii64.slice(0, -1)}&`, ascii64.slice(0, -1)],
    ],
    ['64 Unicode characters', unicode64, [unicode64.slice(0, -1)]],
    ['256 ASCII characters, the last of which counts', longest, [`${longest.slice(0, -1)}&`]],
    ['256 emoji, the last of which counts', longestUnicode, [`${longestUnicode.slice(0, -2)}🧵`]],
    ['NUL within, and what follows it', 'Kv7-aq\0first!', ['Kv7-aq\0other!', 'Kv7-aq', 'Kv7-aqfirst!']],
    ['blanks at both ends', ' Kv7-aq zW9$ ', ['Kv7-aq zW9$', ' Kv7-aq zW9$', 'Kv7-aq zW9$ ']],
    ['upper and lower case', 'Kv7-aqzW9$mR', ['KV7-AQZW9$MR', 'kv7-aqzw9$mr']],
    ['compatibility characters', 'Kv7-aqﬁnW9$', ['Kv7-aqfinW9$']],
    ['zero-width and control characters', 'Kv7\u200B-a\u0007qnW9$', ['Kv7-aqnW9$']],
  ];
  for (const [what, password, others] of near) {
    it(what, async () => {
      assert.deepEqual(await passingFor(password, [password, ...others]), [password]);
    });
  }
});

describe('concurrent changes from one old password', () => {
  for (const [calls, ways] of [
    [2, 'sessions of their own'],
    [2, 'one session'],
    [50, 'sessions of their own'],
    [50, 'one session'],
  ] as const) {
    it(`${calls} of them by three servers through ${ways}: exactly one is OK`, async () => {
      const me = await service.createUser();
      const open = () => (ways === 'one session' ? me.ust : service.openSession(me.userId));
      const sessions = await Promise.all(Array.from({ length: calls }, open));
      const passwords = sessions.map(strongPassword);
      const cid = `race-${randomUUID()}`;
      const answers = await Promise.all(
        sessions.map((ust, index) =>
          change(
            { ust },
            { oldPassword: me.password, newPassword: passwords[index] as string },
            { cid },
            service.servers[index % 3],
          ),
        ),
      );
      const winners = answers.flatMap(({ code }, index) => (code === 'OK' ? [index] : []));
      assert.equal(winners.length, 1, answers.map(({ reason }) => reason).join(' '));
      const excuses = [
        '',
        'CONCURRENT_CHANGE',
        'OLD_PASSWORD_MISMATCH',
        'SESSION_INVALID',
        'TOO_MANY_ATTEMPTS',
      ];
      for (const { reason } of answers) assert.ok(excuses.includes(reason), reason);
      assert.ok(await service.isPassword(me.userId, passwords[winners[0] as number] as string));
      assert.ok(await isLive(sessions[winners[0] as number] as string));
      const records = await service.auditOf(cid);
      assert.equal(records.filter(({ outcome }) => outcome === 'ok').length, 1);
    });
  }
});

describe('a regular user cannot tell an existing user from a missing one', () => {
  it('by the answer, which is the same byte by byte', async () => {
    const me = await service.createUser();
    const other = await service.createUser();
    const session = await rawConnect(service.server.address);
    try {
      const headers = { ust: me.ust, app: 'CRM', cid: 'one-and-the-same' };
      const ask = async (userId: string) => {
        const message = create(ChangePasswordRequestSchema, { userId, newPassword: strongPassword() });
        const body = framed(toBinary(ChangePasswordRequestSchema, message));
        const { headers: initial, trailers, body: answer } = await rawCall(session, headers, body);
        const { date: _, ...rest } = { ...initial };
        return { initial: rest, trailers: { ...trailers }, answer };
      };
      const first = await ask(other.userId);
      assert.equal(first.trailers['grpc-status'], '7');
      for (const userId of [randomUUID(), other.userId, 'x', randomUUID()]) {
        assert.deepEqual(await ask(userId), first);
      }
    } finally {
      session.destroy();
    }
  });

  it('by the time it takes', async () => {
    const me = await service.createUser();
    const other = await service.createUser();
    const ask = async (userId: string) =>
      assertRefused(await change(me, { userId, newPassword: strongPassword() }), 'SUPER_USER_REQUIRED');
    for (let warm = 0; warm < 20; warm++) await ask(randomUUID());
    const { p, isApart } = await timesApart(
      200,
      () => ask(other.userId),
      () => ask(randomUUID()),
    );
    assert.ok(!isApart, `p = ${p}`);
  });
});

describe('remote-addr', () => {
  async function audited(server: ServerProcess, claim: string | undefined) {
    const me = await service.createUser();
    const cid = `addr-${randomUUID()}`;
    const metadata = { cid, ...(claim === undefined ? {} : { 'remote-addr': claim }) };
    assertOk(await change(me, { oldPassword: me.password, newPassword: strongPassword() }, metadata, server));
    const [record] = await service.auditOf(cid);
    return [record?.remote_addr, record?.peer_addr, record?.claimed_addr];
  }

  it('of a peer that is not trusted is kept as a claim', async () => {
    assert.deepEqual(await audited(service.server, '198.51.100.7'), ['127.0.0.1', null, '198.51.100.7']);
    assert.deepEqual(await audited(service.server, undefined), ['127.0.0.1', null, null]);
    assert.deepEqual(await audited(service.server, '127.0.0.1'), ['127.0.0.1', null, null]);
  });

  it('of a trusted peer is believed, in its canonical form', async () => {
    const server = await service.startServer({ REKEY_TRUSTED_PEERS: '10.0.0.0/8,127.0.0.0/8' });
    await server.waitForHealth('SERVING');
    assert.deepEqual(await audited(server, '198.51.100.7'), ['198.51.100.7', '127.0.0.1', null]);
    assert.deepEqual(await audited(server, '2001:DB8:0:0::0:1'), ['2001:db8::1', '127.0.0.1', null]);
    assert.deepEqual(await audited(server, '::ffff:198.51.100.7'), ['198.51.100.7', '127.0.0.1', null]);
    assert.deepEqual(await audited(server, undefined), ['127.0.0.1', null, null]);
    await server.stop();
  });
});

describe('idempotency-key', () => {
  const keyed = () => ({ 'idempotency-key': `key-${randomUUID()}` });

  it('answers a retry with the first outcome, on any server, and changes and counts nothing', async () => {
    const me = await service.createUser();
    await service.openSession(me.userId);
    const message = { oldPassword: me.password, newPassword: strongPassword() };
    const metadata = keyed();
    const first = await change(me, message, metadata);
    assertOk(first);
    const after = await stored(me.userId);
    for (const server of service.servers) {
      const again = await change(me, message, { ...metadata, cid: `again-${server.pid}` }, server);
      assertOk(again);
      assert.deepEqual(again.response, first.response);
      assert.deepEqual(await stored(me.userId), after);
      assert.equal((await server.lineOf(`again-${server.pid}`)).replayed, true);
    }
  });

  it('is refused with another request, or through another session, and nothing is counted', async () => {
    const me = await service.createUser();
    const message = { oldPassword: me.password, newPassword: strongPassword() };
    const metadata = keyed();
    assertOk(await change(me, message, metadata));
    const after = await stored(me.userId);
    const second = { ust: await service.openSession(me.userId) };
    for (const [user, other] of [
      [me, { ...message, newPassword: strongPassword() }],
      [me, { ...message, oldPassword: strongPassword() }],
      [me, { oldPassword: message.newPassword, newPassword: strongPassword() }],
      [second, message],
    ] as const) {
      assertRefused(await change(user, other, metadata), 'IDEMPOTENCY_KEY_REUSED');
    }
    assert.deepEqual(await stored(me.userId), after);
  });

  it("is one user's own: the same key of somebody else is another", async () => {
    const [me, other] = [await service.createUser(), await service.createUser()];
    const metadata = keyed();
    for (const user of [me, other]) {
      const message = { oldPassword: user.password, newPassword: strongPassword() };
      assertOk(await change(user, message, metadata));
    }
  });

  it('is not used up by a refusal', async () => {
    const me = await service.createUser();
    const metadata = keyed();
    const newPassword = strongPassword();
    const wrong = { oldPassword: strongPassword(), newPassword };
    assertRefused(await change(me, wrong, metadata), 'OLD_PASSWORD_MISMATCH');
    assertOk(await change(me, { oldPassword: me.password, newPassword }, metadata));
  });

  it('makes two calls at the same time one change and two OKs', async () => {
    for (let round = 0; round < 5; round++) {
      const me = await service.createUser();
      const message = { oldPassword: me.password, newPassword: strongPassword() };
      const metadata = { ...keyed(), cid: `twins-${randomUUID()}` };
      const answers = await Promise.all(
        service.servers.slice(0, 2).map((server) => change(me, message, metadata, server)),
      );
      answers.forEach(assertOk);
      assert.deepEqual(answers[0]?.response, answers[1]?.response);
      const records = await service.auditOf(metadata.cid);
      assert.equal(records.filter(({ outcome }) => outcome === 'ok').length, 1);
    }
  });

  it('keeps nothing that a password could be guessed against', async () => {
    const me = await service.createUser();
    const message = { oldPassword: me.password, newPassword: strongPassword() };
    const metadata = keyed();
    assertOk(await change(me, message, metadata));
    const [record] = await service.sql('SELECT * FROM idempotency_records WHERE idempotency_key = ?', [
      metadata['idempotency-key'],
    ]);
    assert.equal(record?.request_mac.length, 32);
    const text = JSON.stringify(record);
    for (const secret of [me.password, message.newPassword, me.ust]) assert.ok(!text.includes(secret));
  });
});

describe('the guard on old passwords', () => {
  const LIMIT = 10;
  const guess = (user: TestUser, server = service.server, metadata = {}) =>
    change(user, { oldPassword: strongPassword(), newPassword: strongPassword() }, metadata, server);

  it('looks at no more than the limit of 200 guesses at once over three servers, and outlives them', async () => {
    const me = await service.createUser();
    const answers = await Promise.all(
      Array.from({ length: 200 }, (_, index) =>
        guess(me, service.servers[index % 3], { cid: `guess-${me.userId}-${index}` }),
      ),
    );
    const reasons = Map.groupBy(answers, ({ reason }) => reason);
    assert.deepEqual([...reasons.keys()].sort(), ['OLD_PASSWORD_MISMATCH', 'TOO_MANY_ATTEMPTS']);
    assert.equal(reasons.get('OLD_PASSWORD_MISMATCH')?.length, LIMIT);
    assert.equal((await stored(me.userId)).old_password_attempts, LIMIT);
    const looks = await Promise.all(
      answers.map(
        async ({ cid }, index) => (await service.servers[index % 3]?.lineOf(cid as string))?.hashMs,
      ),
    );
    assert.ok(looks.filter((ms) => (ms as number) > 0).length <= LIMIT);

    const message = { oldPassword: me.password, newPassword: strongPassword() };
    for (const server of service.servers) {
      const answer = await change(me, message, {}, server);
      assertRefused(answer, 'TOO_MANY_ATTEMPTS');
      assert.ok((answer.retryMs ?? 0) > 800_000 && (answer.retryMs ?? 0) <= 900_000);
    }
    const newcomer = await service.startServer();
    await newcomer.waitForHealth('SERVING');
    assertRefused(await change(me, message, {}, newcomer), 'TOO_MANY_ATTEMPTS');
    await newcomer.stop();

    const age =
      'UPDATE users SET old_password_attempts_since = UTC_TIMESTAMP(6) - INTERVAL ? SECOND WHERE user_id = ?';
    await service.sql(age, [890, me.userId]);
    const nearly = await change(me, message);
    assertRefused(nearly, 'TOO_MANY_ATTEMPTS');
    assert.ok((nearly.retryMs ?? 0) <= 10_000);
    await service.sql(age, [900, me.userId]);
    assertOk(await change(me, message));
  });

  it('counts by user, whatever the remote-addr, the session and the application', async () => {
    const server = await service.startServer({ REKEY_TRUSTED_PEERS: '127.0.0.1' });
    await server.waitForHealth('SERVING');
    const me = await service.createUser();
    for (let index = 0; index < LIMIT; index++) {
      const ust = await service.openSession(me.userId);
      const metadata = { 'remote-addr': `192.0.2.${index}`, app: index % 2 ? 'ERP' : 'CRM' };
      assertRefused(await guess({ ...me, ust }, server, metadata), 'OLD_PASSWORD_MISMATCH');
    }
    const metadata = { 'remote-addr': '198.51.100.1' };
    assertRefused(await guess(me, server, metadata), 'TOO_MANY_ATTEMPTS');
    await server.stop();
  });

  it('begins anew after a right one', async () => {
    const me = await service.createUser();
    let password = me.password;
    for (let round = 0; round < 3; round++) {
      for (let wrong = 0; wrong < LIMIT - 1; wrong++) assertRefused(await guess(me), 'OLD_PASSWORD_MISMATCH');
      const newPassword = strongPassword();
      assertOk(await change(me, { oldPassword: password, newPassword }));
      assert.equal((await stored(me.userId)).old_password_attempts, 0);
      password = newPassword;
    }
  });

  it('counts nothing for those who have no session, nor for bad requests and bad new passwords', async () => {
    const me = await service.createUser();
    const oldPassword = strongPassword();
    await change({ ust: randomUUID() }, { userId: me.userId, oldPassword, newPassword: strongPassword() });
    await change(await service.createUser(), {
      userId: me.userId,
      oldPassword,
      newPassword: strongPassword(),
    });
    await change(me, { oldPassword, newPassword: 'short' });
    await change(me, { oldPassword, newPassword: strongPassword(), passwordExpiry: 0 });
    assert.equal((await stored(me.userId)).old_password_attempts, 0);
  });

  it('forgets nothing if the server is killed between the count and the look', async () => {
    const me = await service.createUser();
    // A hash that takes seconds, so that the process dies while it is made.
    const slow = { REKEY_HASH_MEMORY_KIB: '65536', REKEY_HASH_ITERATIONS: '60' };
    const environment = { REKEY_DATABASE_URL: service.databaseUrl, REKEY_APPS: 'CRM', ...slow };
    const hash = await (await createHasher(loadConfig(undefined, environment))).hash(
      me.password,
      Wait.forMs(60_000),
    );
    await service.sql('UPDATE users SET password_hash = ? WHERE user_id = ?', [hash, me.userId]);
    const victim = await service.startServer();
    await victim.waitForHealth('SERVING');
    const call = guess(me, victim);
    await eventually(
      'the attempt is counted',
      async () => (await stored(me.userId)).old_password_attempts === 1,
    );
    await victim.kill();
    assert.notEqual((await call).code, 'OK');
    assert.equal((await stored(me.userId)).old_password_attempts, 1);
  });
});
