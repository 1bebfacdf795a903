import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { after, before, describe, it } from 'node:test';
import { create, toBinary } from '@bufbuild/protobuf';
import { timestampDate } from '@bufbuild/protobuf/wkt';
import mysql from 'mysql2/promise';
import {
  LoginRequestSchema,
  type LoginResponse,
  SessionService,
} from '../../gen/rekey/v1/session_service_pb.ts';
import { PrivateDatabaseError, startPrivateDatabase, testDatabaseKind } from '../support/private_database.ts';
import { framed, rawCall, rawConnect } from '../support/raw_http2.ts';
import {
  type Answer,
  type ServerProcess,
  type Service,
  startService,
  strongPassword,
  type TestUser,
  type UserOptions,
} from '../support/service.ts';
import { timesApart } from '../support/statistics.ts';
import { findPython, type PythonClient, startPythonClient } from './python/client.ts';

type Metadata = Record<string, string>;

let service: Service;
before(async () => {
  service = await startService({ REKEY_TRUSTED_PEERS: '127.0.0.1' }, { servers: 3 });
});
after(() => service.stop());

async function login(
  username: string,
  password: string,
  newPassword?: string,
  { metadata = {}, server = service.server }: { metadata?: Metadata; server?: ServerProcess } = {},
): Promise<Answer<LoginResponse>> {
  for (const secret of [password, newPassword]) if (secret) service.secrets.add(secret);
  const answer = await server.answerOf((onHeader) =>
    server.client(SessionService).login(
      { username, password, ...(newPassword === undefined ? {} : { newPassword }) },
      // An address of one's own, so that no test uses up another's.
      { headers: { app: 'CRM', 'remote-addr': randomAddress(), ...metadata }, onHeader },
    ),
  );
  if (answer.response) service.secrets.add(answer.response.ust);
  return answer;
}

const randomAddress = () =>
  `2001:db8:${Array.from({ length: 6 }, () => Math.floor(Math.random() * 65_536).toString(16)).join(':')}`;

const getSession = (ust: string, server = service.server) =>
  server.answerOf((onHeader) =>
    server.client(SessionService).getSession({}, { headers: { ust, app: 'CRM' }, onHeader }),
  );

const logout = (ust: string, cid: string = randomUUID()) =>
  service.server.answerOf((onHeader) =>
    service.server.client(SessionService).logout({}, { headers: { ust, app: 'CRM', cid }, onHeader }),
  );

const changePassword = (user: { ust: string; password: string }, newPassword = strongPassword()) =>
  service.server.change({ ust: user.ust, app: 'CRM' }, { oldPassword: user.password, newPassword });

const assertRefused = (answer: Answer<unknown>, code: string, reason: string, subStatus?: string) =>
  assert.deepEqual([answer.code, answer.reason, answer.metadata.sub_status], [code, reason, subStatus]);
const assertOk = (answer: Answer<unknown>) => assert.equal(`${answer.code} ${answer.reason}`, 'OK ');

async function sessionsOf(userId: string): Promise<number> {
  const [row] = await service.sql(
    'SELECT COUNT(*) AS n FROM sessions WHERE user_id = ? AND ended_at IS NULL AND expires_at > UTC_TIMESTAMP(6)',
    [userId],
  );
  return Number(row?.n);
}

const outcomes = async (cid: string) =>
  (await service.auditOf(cid)).map(({ action, outcome, reason }) => `${action} ${outcome} ${reason}`.trim());

const expire = (userId: string) =>
  service.sql('UPDATE users SET password_expires_at = UTC_TIMESTAMP(6) WHERE user_id = ?', [userId]);

describe('Login', () => {
  it('opens a session that is good for a change, and is audited', async () => {
    const me = await service.createUser();
    const cid = `login-${randomUUID()}`;
    const answer = await login(me.username, me.password, undefined, {
      metadata: { cid, 'remote-addr': '198.51.100.9' },
    });
    assertOk(answer);
    assert.equal(answer.cid, cid);
    const { response } = answer;
    assert.ok(response?.sessionExpiryTime && response.passwordExpiryTime);
    assert.match(response.ust, /^[A-Za-z0-9_-]{43}$/);
    assert.equal(response.userId, me.userId);
    assert.equal(response.passwordAboutToExpire, false);
    const [row] = await service.sql(
      'SELECT app, remote_addr, TIMESTAMPDIFF(SECOND, opened_at, expires_at) AS lifetime FROM sessions WHERE token_hash = UNHEX(SHA2(?, 256))',
      [response.ust],
    );
    assert.deepEqual({ ...row }, { app: 'CRM', remote_addr: '198.51.100.9', lifetime: 8 * 3600 });
    assert.deepEqual(await outcomes(cid), ['Login ok']);
    assertOk(await changePassword({ ...me, ust: response.ust }));
  });

  it('knows a name in any case and any Unicode form, and a password in its own case only', async () => {
    const me = await service.createUser({ username: `Zoë-${randomUUID()}`, password: 'Grüße-Kv7-aq!' });
    const names = [me.username.toUpperCase(), me.username.normalize('NFD'), me.username.toLowerCase()];
    for (const name of names) assertOk(await login(name, me.password.normalize('NFD')));
    assertRefused(
      await login(me.username, me.password.toUpperCase()),
      'UNAUTHENTICATED',
      'CREDENTIALS_INVALID',
      'E005001',
    );
  });

  it('refuses what is malformed, and applications that are not listed', async () => {
    const me = await service.createUser();
    const bad: [Promise<Answer<unknown>>, string[]][] = [
      [login('', ''), ['password REQUIRED', 'username REQUIRED']],
      [login('x'.repeat(129), 'p'), ['username MALFORMED']],
      [login(me.username, me.password, ''), ['new_password REQUIRED']],
      [login(me.username, me.password, undefined, { metadata: { app: '' } }), ['app REQUIRED']],
    ];
    for (const [call, violations] of bad) {
      const answer = await call;
      assert.deepEqual([answer.reason, answer.violations], ['INVALID_REQUEST', violations]);
    }
    assertRefused(
      await login(me.username, me.password, undefined, { metadata: { app: 'MRP' } }),
      'PERMISSION_DENIED',
      'APP_NOT_ALLOWED',
      'E004001',
    );
  });

  const states: [string, UserOptions, string, string, string][] = [
    ['locked', { isLocked: true }, 'PERMISSION_DENIED', 'USER_LOCKED', 'E005002'],
    ['pending', { approval: 'pending' }, 'PERMISSION_DENIED', 'USER_NOT_APPROVED', 'E005003'],
    ['rejected', { approval: 'rejected' }, 'PERMISSION_DENIED', 'USER_NOT_APPROVED', 'E005004'],
    ['expired', { hasExpired: true }, 'FAILED_PRECONDITION', 'PASSWORD_CHANGE_REQUIRED', 'E003004'],
    ['to be changed', { mustChange: true }, 'FAILED_PRECONDITION', 'PASSWORD_CHANGE_REQUIRED', 'E003007'],
  ];
  for (const [state, options, code, reason, subStatus] of states) {
    it(`tells that the account or password is ${state} to those who know the password, and to no others`, async () => {
      const me = await service.createUser(options);
      const before = await sessionsOf(me.userId);
      const cid = `state-${randomUUID()}`;
      assertRefused(
        await login(me.username, strongPassword(), strongPassword()),
        'UNAUTHENTICATED',
        'CREDENTIALS_INVALID',
        'E005001',
      );
      const answer = await login(me.username, me.password, undefined, { metadata: { cid } });
      assertRefused(answer, code, reason, subStatus);
      assert.deepEqual(await outcomes(cid), [`Login refused ${reason}`]);
      assert.equal(await sessionsOf(me.userId), before);
    });
  }

  for (const options of [{ hasExpired: true }, { mustChange: true }, {}]) {
    it(`sets the new password and opens a session in one step: ${JSON.stringify(options)}`, async () => {
      const me = await service.createUser(options);
      const cid = `step-${randomUUID()}`;
      const bad = await login(me.username, me.password, 'hunter2', { metadata: { cid: `${cid}-bad` } });
      assert.equal(bad.reason, 'PASSWORD_POLICY');
      assert.deepEqual(bad.violations, [
        'new_password COMMON',
        'new_password TOO_SHORT',
        'new_password TOO_WEAK',
      ]);
      assert.equal(await sessionsOf(me.userId), 1);
      assert.equal((await login(me.username, me.password, me.password)).reason, 'PASSWORD_POLICY');

      const newPassword = strongPassword();
      const answer = await login(me.username, me.password, newPassword, { metadata: { cid } });
      assertOk(answer);
      assert.equal(answer.response?.passwordAboutToExpire, false);
      assert.deepEqual((await outcomes(cid)).sort(), ['ChangePassword ok', 'Login ok']);
      assert.equal(await sessionsOf(me.userId), 1, 'the old session was ended, the new one lives');
      assert.equal((await getSession(me.ust)).reason, 'SESSION_INVALID');
      assert.equal(
        (await getSession(answer.response?.ust as string)).response?.passwordChangeRequired,
        false,
      );
      assertRefused(
        await login(me.username, me.password),
        'UNAUTHENTICATED',
        'CREDENTIALS_INVALID',
        'E005001',
      );
      assertOk(await login(me.username, newPassword));
    });
  }

  it('of two with one old and two new passwords sets one', async () => {
    const me = await service.createUser({ mustChange: true });
    const passwords = [strongPassword(), strongPassword()];
    const answers = await Promise.all(
      passwords.map((password, index) =>
        login(me.username, me.password, password, { server: service.servers[index] as ServerProcess }),
      ),
    );
    const winners = answers.flatMap(({ code }, index) => (code === 'OK' ? [index] : []));
    assert.equal(winners.length, 1);
    const loser = answers[winners[0] === 0 ? 1 : 0] as Answer<unknown>;
    assert.ok(['CONCURRENT_CHANGE', 'CREDENTIALS_INVALID'].includes(loser.reason), loser.reason);
    assert.ok(await service.isPassword(me.userId, passwords[winners[0] as number] as string));
    assert.equal(await sessionsOf(me.userId), 1);
  });

  for (const [what, statement] of [
    ['locked', 'UPDATE users SET is_locked = TRUE WHERE user_id = ?'],
    ['rejected', "UPDATE users SET approval = 'rejected' WHERE user_id = ?"],
    ['told to change the password', 'UPDATE users SET must_change = TRUE WHERE user_id = ?'],
    [
      'given another password',
      "UPDATE users SET password_hash = CONCAT(password_hash, 'A') WHERE user_id = ?",
    ],
  ] as const) {
    it(`opens no session for somebody who is ${what} while the call is under way`, async () => {
      const me = await service.createUser();
      const pending = await service.whileLocked(
        me.userId,
        async () => {
          const call = login(me.username, me.password);
          await service.waitForLockWaits();
          await service.sql(statement, [me.userId]);
          return { call };
        },
        'users',
      );
      assertRefused(await pending.call, 'ABORTED', 'CONCURRENT_CHANGE');
      assert.equal(await sessionsOf(me.userId), 1);
    });
  }

  it('replaces a hash that is weaker than configured, or made without the current pepper', async () => {
    const peppers = 'k1:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3';
    const steps: [Record<string, string>, RegExp][] = [
      [{ REKEY_HASH_ITERATIONS: '3' }, /m=64,t=3,p=1\$/],
      [
        { REKEY_HASH_ITERATIONS: '3', REKEY_HASH_PEPPER_KEYS: peppers, REKEY_HASH_PEPPER_KEY_ID: 'k1' },
        /t=3,p=1,keyid=/,
      ],
    ];
    const me = await service.createUser();
    for (const [environment, form] of steps) {
      const server = await service.startServer(environment);
      await server.waitForHealth('SERVING');
      const cid = `rehash-${randomUUID()}`;
      assertOk(await login(me.username, me.password, undefined, { server, metadata: { cid } }));
      const hash = await service.storedHash(me.userId);
      assert.match(hash, form);
      assert.match(JSON.stringify((await service.auditOf(cid))[0]?.request), /rehashed/);
      assertOk(await login(me.username, me.password, undefined, { server }));
      assert.equal(await service.storedHash(me.userId), hash, 'once is enough');
      await server.stop();
    }
  });
});

describe('nobody can tell an unknown user from a wrong password', () => {
  it('by the answer, which is the same byte by byte', async () => {
    const me = await service.createUser();
    const session = await rawConnect(service.server.address);
    const ask = async (username: string) => {
      const message = create(LoginRequestSchema, { username, password: 'Kv7-something' });
      const { headers, trailers, body } = await rawCall(
        session,
        { app: 'CRM', cid: 'one-and-the-same', 'remote-addr': randomAddress() },
        framed(toBinary(LoginRequestSchema, message)),
        { path: '/rekey.v1.SessionService/Login' },
      );
      const { date: _, ...rest } = { ...headers };
      return { headers: rest, trailers: { ...trailers }, body };
    };
    const first = await ask(me.username);
    assert.equal(first.trailers['grpc-status'], '16');
    for (const name of [`n-${randomUUID()}`, me.username, 'x']) assert.deepEqual(await ask(name), first);
    session.destroy();
  });

  it('by the time it takes', async () => {
    // A hash that is dear enough to be missed, and the same for everybody.
    const people = await startService({
      REKEY_HASH_MEMORY_KIB: '2048',
      REKEY_HASH_ITERATIONS: '2',
      REKEY_GUARD_LOGIN_ATTEMPTS: '100',
      REKEY_GUARD_LOGIN_ATTEMPTS_PER_ADDRESS: '100000',
    });
    const PEOPLE = 20;
    const known: string[] = [];
    while (known.length < PEOPLE) known.push((await people.createUser()).username);
    const unknown = known.map(() => `u-${randomUUID()}`);
    const ask = async (names: string[], index: number) => {
      const name = names[index % PEOPLE] as string;
      const answer = await login(name, strongPassword(), undefined, { server: people.server });
      assert.equal(answer.reason, 'CREDENTIALS_INVALID');
    };
    for (let warm = 0; warm < PEOPLE; warm++) {
      await ask(known, warm);
      await ask(unknown, warm);
    }
    const { p, isApart } = await timesApart(
      500,
      (index) => ask(known, index),
      (index) => ask(unknown, index),
    );
    await people.stop();
    assert.ok(!isApart, `p = ${p}`);
  });
});

describe('the guard on log-ins', () => {
  const LIMIT = 10;
  const fail = async (username: string, metadata: Metadata = {}, server = service.server) =>
    (await login(username, strongPassword(), undefined, { metadata, server })).reason;

  it('shuts an account after ten wrong ones, whether there is such a user or not, and opens by itself', async () => {
    const me = await service.createUser();
    for (const name of [me.username, `nobody-${randomUUID()}`]) {
      for (let wrong = 0; wrong < LIMIT; wrong++) assert.equal(await fail(name), 'CREDENTIALS_INVALID');
      assert.equal(await fail(name), 'TOO_MANY_ATTEMPTS');
    }
    const shut = await login(me.username.toUpperCase(), me.password);
    assert.equal(`${shut.code} ${shut.reason}`, 'RESOURCE_EXHAUSTED TOO_MANY_ATTEMPTS');
    assert.ok((shut.retryMs ?? 0) > 800_000 && (shut.retryMs ?? 0) <= 900_000);

    // Whoever has a session is not shut out from what it is for.
    const newPassword = strongPassword();
    assertOk(await changePassword(me, newPassword));

    await service.sql('UPDATE login_attempts SET since = since - INTERVAL 900 SECOND');
    assertOk(await login(me.username, newPassword));
  });

  it('begins anew after a right password', async () => {
    const me = await service.createUser();
    for (let round = 0; round < 3; round++) {
      for (let wrong = 0; wrong < LIMIT - 1; wrong++) await fail(me.username);
      assertOk(await login(me.username, me.password));
    }
  });

  it('looks at no more than the limit of 100 guesses at once over three servers', async () => {
    const me = await service.createUser();
    const reasons = await Promise.all(
      Array.from({ length: 100 }, (_, index) => fail(me.username, {}, service.servers[index % 3])),
    );
    assert.ok(reasons.every((reason) => ['CREDENTIALS_INVALID', 'TOO_MANY_ATTEMPTS'].includes(reason)));
    assert.ok(reasons.filter((reason) => reason === 'CREDENTIALS_INVALID').length <= LIMIT);
  });

  it('shuts an address after a hundred, for all accounts, and no other address', async () => {
    const me = await service.createUser();
    const from = { 'remote-addr': randomAddress() };
    for (let wrong = 0; wrong < 100; wrong++)
      assert.equal(await fail(`n${wrong}-${randomUUID()}`, from), 'CREDENTIALS_INVALID');
    const shut = await login(me.username, me.password, undefined, { metadata: from });
    assert.equal(shut.reason, 'TOO_MANY_ATTEMPTS');
    assertOk(await login(me.username, me.password));
  });
});

describe('Logout and GetSession', () => {
  it('Logout ends the session and no other', async () => {
    const me = await service.createUser();
    const second = await service.openSession(me.userId);
    const cid = `logout-${randomUUID()}`;
    assertOk(await logout(me.ust, cid));
    assert.deepEqual(await outcomes(cid), ['Logout ok']);
    for (const again of [await logout(me.ust), await getSession(me.ust), await changePassword(me)]) {
      assertRefused(again, 'UNAUTHENTICATED', 'SESSION_INVALID', 'E007001');
    }
    assertOk(await getSession(second));
  });

  it('GetSession tells who one is, and does not prolong the session', async () => {
    const me = await service.createUser({ isSuperUser: true });
    const expiry = async () =>
      (await service.sql('SELECT expires_at FROM sessions WHERE user_id = ?', [me.userId]))[0]
        ?.expires_at as Date;
    const before = await expiry();
    const { response } = await getSession(me.ust);
    assert.ok(response?.sessionExpiryTime && response.passwordExpiryTime);
    assert.deepEqual(
      [response.userId, response.username, response.superUser, response.passwordChangeRequired],
      [me.userId, me.username, true, false],
    );
    assert.equal(timestampDate(response.sessionExpiryTime).getTime(), before.getTime());
    assert.deepEqual(await expiry(), before);
  });

  for (const options of [{ mustChange: true }, { hasExpired: true }]) {
    it(`a session is good for little while the password is due: ${JSON.stringify(options)}`, async () => {
      const boss = await service.createUser({ ...options, isSuperUser: true });
      const other = await service.createUser();
      assert.equal((await getSession(boss.ust)).response?.passwordChangeRequired, true);
      const act = () =>
        service.server.change(
          { ust: boss.ust, app: 'CRM' },
          { userId: other.userId, newPassword: strongPassword() },
        );
      assert.equal((await act()).reason, 'OWN_PASSWORD_CHANGE_REQUIRED');
      assertOk(await changePassword(boss));
      assert.equal((await getSession(boss.ust)).response?.passwordChangeRequired, false);
      assertOk(await act());

      const leaving = await service.createUser(options);
      assertOk(await logout(leaving.ust));
    });
  }

  it('who is locked can no longer do anything, from the next call on', async () => {
    const me = await service.createUser();
    assertOk(await getSession(me.ust));
    await service.sql('UPDATE users SET is_locked = TRUE WHERE user_id = ?', [me.userId]);
    assertRefused(await getSession(me.ust), 'PERMISSION_DENIED', 'USER_LOCKED', 'E005002');
    assertRefused(await changePassword(me), 'PERMISSION_DENIED', 'USER_LOCKED', 'E005002');
  });
});

const found = await findPython();

describe('must_change and password_expiry, from Python', {
  skip: 'skip' in found ? found.skip : false,
}, () => {
  let python: PythonClient | undefined;
  before(async () => {
    if ('python' in found) python = await startPythonClient(found.python, service.server.address);
  });
  after(() => python?.close());

  const loginFromPython = async (username: string, password: string, newPassword?: string) => {
    const message = { username, password, new_password: newPassword };
    const metadata = { app: 'CRM', 'remote-addr': randomAddress() };
    const outcome = await (python as PythonClient).call('SessionService', 'Login', metadata, message);
    if (outcome.response) service.secrets.add(String(outcome.response.ust));
    return outcome;
  };
  const set = async (user: TestUser, message: Record<string, unknown>) => {
    const boss = await service.createUser({ isSuperUser: true });
    const password = strongPassword();
    service.secrets.add(password);
    const metadata = { ust: boss.ust, app: 'CRM' };
    const request = { user_id: user.userId, new_password: password, ...message };
    const outcome = await (python as PythonClient).call('UserService', 'ChangePassword', metadata, request);
    assert.equal(outcome.code, 'OK');
    return password;
  };

  it('with both, the log-in wants a new password, and warns of nothing once it has one', async () => {
    const me = await service.createUser();
    const password = await set(me, { must_change: true, password_expiry: 1 });
    const refused = await loginFromPython(me.username, password);
    assert.equal(refused.code, 'FAILED_PRECONDITION');
    assert.equal(refused.details.ErrorInfo?.reason, 'PASSWORD_CHANGE_REQUIRED');
    assert.equal(refused.details.ErrorInfo?.metadata.sub_status, 'E003007');

    const newPassword = strongPassword();
    service.secrets.add(newPassword);
    const { code, response } = await loginFromPython(me.username, password, newPassword);
    assert.equal(code, 'OK');
    assert.equal(response?.password_about_to_expire, undefined, 'false is not on the wire');
    const metadata = { ust: String(response?.ust), app: 'CRM' };
    const session = await (python as PythonClient).call('SessionService', 'GetSession', metadata, {});
    assert.equal(session.response?.user_id, me.userId);
    assert.equal(session.response?.password_change_required, undefined);
    assert.equal((await (python as PythonClient).call('SessionService', 'Logout', metadata, {})).code, 'OK');
  });

  it('password_expiry: 1 alone warns today, and a day later the log-in is refused', async () => {
    const me = await service.createUser();
    const password = await set(me, { password_expiry: 1 });
    const today = await loginFromPython(me.username, password);
    assert.equal(today.code, 'OK');
    assert.equal(today.response?.password_about_to_expire, true);

    // The database's clock is what counts: a day passes by everything stored being a day older.
    await service.sql(
      'UPDATE users SET password_set_at = password_set_at - INTERVAL 1 DAY, password_expires_at = password_expires_at - INTERVAL 1 DAY WHERE user_id = ?',
      [me.userId],
    );
    const tomorrow = await loginFromPython(me.username, password);
    assert.equal(tomorrow.code, 'FAILED_PRECONDITION');
    assert.equal(tomorrow.details.ErrorInfo?.metadata.sub_status, 'E003004');
  });
});

it('a log-in warns from 30 days before the expiry on, or as configured', async () => {
  const me = await service.createUser();
  const server = await service.startServer({ REKEY_POLICY_EXPIRY_WARNING_DAYS: '5' });
  await server.waitForHealth('SERVING');
  const warns = async (days: number, where = service.server) => {
    await service.sql(
      'UPDATE users SET password_expires_at = UTC_TIMESTAMP(6) + INTERVAL ? HOUR WHERE user_id = ?',
      [24 * days, me.userId],
    );
    const answer = await login(me.username, me.password, undefined, { server: where });
    assertOk(answer);
    return answer.response?.passwordAboutToExpire;
  };
  assert.deepEqual(
    [await warns(31), await warns(29.5), await warns(6, server), await warns(4.5, server)],
    [false, true, false, true],
  );
  await expire(me.userId);
  assert.equal((await login(me.username, me.password)).reason, 'PASSWORD_CHANGE_REQUIRED');
  await service.sql('UPDATE users SET password_expires_at = NULL WHERE user_id = ?', [me.userId]);
  const { response } = await login(me.username, me.password);
  assert.deepEqual([response?.passwordExpiryTime, response?.passwordAboutToExpire], [undefined, false]);
  await server.stop();
});

it('both guards survive a restart of server and database', async (t) => {
  const own = await startPrivateDatabase({ kind: testDatabaseKind() }).catch((error: unknown) => {
    if (!(error instanceof PrivateDatabaseError)) throw error;
    // A server that REKEY_DATABASE_URL names is somebody's, and not ours to restart.
    t.skip(`no database of its own to be restarted: ${error.message}`);
  });
  if (!own) return;
  const admin = await mysql.createConnection({ uri: own.url() });
  await admin.query('CREATE DATABASE guards CHARACTER SET utf8mb4');
  await admin.end();
  const people = await startService({}, { databaseUrl: own.url('guards') });
  try {
    const me = await people.createUser();
    const guessOld = (server: ServerProcess, oldPassword = strongPassword()) =>
      server.change({ ust: me.ust, app: 'CRM' }, { oldPassword, newPassword: strongPassword() });
    const guessLogin = (server: ServerProcess, password = strongPassword()) =>
      login(me.username, password, undefined, { server });
    for (let wrong = 0; wrong < 10; wrong++) {
      assert.equal((await guessOld(people.server)).reason, 'OLD_PASSWORD_MISMATCH');
      assert.equal((await guessLogin(people.server)).reason, 'CREDENTIALS_INVALID');
    }
    await Promise.all([people.server.kill(), own.kill()]);
    await own.start();
    const server = await people.startServer();
    await server.waitForHealth('SERVING');
    assert.equal((await guessOld(server, me.password)).reason, 'TOO_MANY_ATTEMPTS');
    assert.equal((await guessLogin(server, me.password)).reason, 'TOO_MANY_ATTEMPTS');
  } finally {
    await people.stop();
    await own.dispose();
  }
});
