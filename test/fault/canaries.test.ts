import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createReadStream } from 'node:fs';
import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { create, toBinary } from '@bufbuild/protobuf';
import { ConnectError } from '@connectrpc/connect';
import { credentials, Metadata, makeGenericClientConstructor, type ServiceError } from '@grpc/grpc-js';
import type { RowDataPacket } from 'mysql2/promise';
import { LoginRequestSchema } from '../../gen/rekey/v1/session_service_pb.ts';
import { ChangePasswordRequestSchema } from '../../gen/rekey/v1/user_service_pb.ts';
import { freePort, type PrivateDatabase, startPrivateDatabase } from '../support/private_database.ts';
import { Caller, type Heard, heard } from './caller.ts';
import {
  buildStage,
  LEDGER_SERVER_ARGS,
  PROJECT,
  restartUntilItRuns,
  type ServerPlace,
  type Stage,
} from './stage.ts';

/** What must never be seen, and where it may stand all the same. */
interface Canary {
  readonly kind:
    | 'password'
    | 'token'
    | 'key'
    | 'pepper'
    | 'database password'
    | 'password in the place of a username';
  readonly text: string;
}

/** Every statement with its parameters. Somebody has to be looked for under the name that was given. */
const GENERAL_LOG = 'general.log';

const canaries: Canary[] = [];
let serial = 0;

function plant(
  kind: Canary['kind'],
  text = `canary${++serial}-${kind.slice(0, 4)}-${randomBytes(9).toString('hex')}`,
): string {
  canaries.push({ kind, text });
  return text;
}
const password = () => plant('password');
const key = () => plant('key');

/** The forms in which a secret could come to light. */
function formsOf({ text, kind }: Canary): Buffer[] {
  const bytes = kind === 'pepper' ? Buffer.from(text, 'base64') : Buffer.from(text);
  return [
    Buffer.from(text),
    bytes,
    // Padding and what precedes shift the last characters of base64, not the ones in the middle.
    Buffer.from(bytes.toString('base64').replace(/=+$/, '').slice(0, -1)),
    Buffer.from(bytes.toString('hex')),
    Buffer.from(bytes.toString('hex').toUpperCase()),
    Buffer.from(text, 'utf16le'),
  ];
}

function hitsIn(
  content: Buffer | string,
  where: string,
  mayHold: (canary: Canary) => boolean = () => false,
): string[] {
  const bytes = Buffer.isBuffer(content) ? content : Buffer.from(content);
  return canaries
    .filter((canary) => !mayHold(canary) && formsOf(canary).some((form) => bytes.includes(form)))
    .map(({ kind, text }) => `${kind} ${text} in ${where}`);
}

const pepper = plant('pepper', randomBytes(24).toString('base64'));
const errors: string[] = [];
let database: PrivateDatabase;
let stage: Stage;
let server: ServerPlace;
let caller: Caller;
let metricsPort: number;
const commandLines: string[] = [];
const outputs: string[] = [];
const metrics: string[] = [];

before(async () => {
  metricsPort = await freePort();
  database = await startPrivateDatabase({
    kind: 'mariadb',
    password: plant('database password'),
    args: [
      ...LEDGER_SERVER_ARGS,
      '--log-warnings=9',
      '--general-log=ON',
      `--general-log-file=${GENERAL_LOG}`,
    ],
  });
  stage = await buildStage({
    databaseUrl: () => database.url(),
    servers: 1,
    environment: {
      REKEY_LOG_LEVEL: 'trace',
      REKEY_METRICS_LISTEN: `127.0.0.1:${metricsPort}`,
      REKEY_HASH_PEPPER_KEYS: `k1:${pepper}`,
      REKEY_HASH_PEPPER_KEY_ID: 'k1',
      REKEY_POLICY_MIN_COMPLEXITY: '3',
      REKEY_LIMITS_SHUTDOWN_GRACE_SECONDS: '2',
    },
  });
  server = stage.servers[0] as ServerPlace;
  caller = new Caller(stage);
});

after(async () => {
  caller?.dispose();
  await stage?.dispose();
  await database?.dispose();
});

/** All that an error says, details decoded or not. */
function keepError(error: ConnectError | ServiceError | undefined): void {
  if (!error) return;
  if (error instanceof ConnectError) {
    const details = error.details.map((detail) =>
      'value' in detail ? Buffer.from(detail.value as Uint8Array).toString('latin1') : '',
    );
    errors.push(
      [
        error.message,
        ...[...error.metadata.entries()].map(([name, value]) => `${name}: ${value}`),
        ...details,
      ].join('\n'),
    );
  } else {
    const trailers = Object.values(error.metadata?.getMap() ?? {}).map((value) =>
      Buffer.isBuffer(value) ? value.toString('latin1') : value,
    );
    errors.push([error.details, ...trailers].join('\n'));
  }
}

async function change(
  who: { ust: string; key?: string },
  message: { oldPassword?: string; newPassword: string; userId?: string },
): Promise<Heard> {
  const answer = await caller.change({ cid: `canary-${++serial}`, ...who }, message);
  keepError(answer.error);
  return answer;
}

async function logIn(username: string, password: string, newPassword?: string): Promise<string> {
  let ust = '';
  const answer = await heard(async () => {
    const response = await caller.sessions.login(
      { username, password, ...(newPassword === undefined ? {} : { newPassword }) },
      { headers: { app: 'CRM' } },
    );
    ust = plant('token', response.ust);
    return '';
  });
  keepError(answer.error);
  return ust;
}

async function newPerson(isSuperUser = false) {
  const current = password();
  const username = `person${++serial}`;
  const userId = await stage.createUser({ username, password: current, isSuperUser });
  return { userId, username, current, ust: plant('token', await stage.openSession(userId)) };
}

/** Bytes as they are, to any method, with any metadata. */
function raw(path: string, bytes: Buffer, metadata: Record<string, string | string[]>): Promise<void> {
  const same = (value: Buffer) => value;
  const Client = makeGenericClientConstructor({}, 'raw');
  const client = new Client(`127.0.0.1:${server.port}`, credentials.createInsecure());
  const headers = new Metadata();
  for (const [name, values] of Object.entries(metadata))
    for (const value of [values].flat()) headers.add(name, value);
  return new Promise((resolve) =>
    client.makeUnaryRequest(path, same, same, bytes, headers, { deadline: Date.now() + 5000 }, (error) => {
      keepError(error ?? undefined);
      client.close();
      resolve();
    }),
  );
}

async function keepTraces(): Promise<void> {
  if (server.pid !== undefined) {
    commandLines.push(await readFile(`/proc/${server.pid}/cmdline`, 'utf8').catch(() => ''));
    metrics.push(await (await fetch(`http://127.0.0.1:${metricsPort}/metrics`)).text());
  }
}

async function restart(): Promise<void> {
  if (database.pid === undefined) await restartUntilItRuns(database);
  if (!server.isRunning) await server.start();
}

test('secrets go down every path', async (t) => {
  const CHANGE = '/rekey.v1.UserService/ChangePassword';
  const LOGIN = '/rekey.v1.SessionService/Login';

  await t.test('changes that succeed and that are refused', async () => {
    const person = await newPerson();
    const chief = await newPerson(true);
    const next = password();
    const used = key();
    const request = { oldPassword: person.current, newPassword: next };
    assert.equal((await change({ ust: person.ust, key: used }, request)).reason, 'OK');
    assert.equal((await change({ ust: person.ust, key: used }, request)).reason, 'OK');
    assert.equal(
      (await change({ ust: person.ust, key: used }, { ...request, newPassword: password() })).reason,
      'IDEMPOTENCY_KEY_REUSED',
    );
    assert.equal(
      (await change({ ust: person.ust, key: key() }, { oldPassword: password(), newPassword: password() }))
        .reason,
      'OLD_PASSWORD_MISMATCH',
    );
    assert.equal(
      (await change({ ust: person.ust }, { oldPassword: next, newPassword: next })).reason,
      'PASSWORD_POLICY',
    );
    assert.equal(
      (await change({ ust: person.ust }, { oldPassword: next, newPassword: password().repeat(20) })).reason,
      'PASSWORD_POLICY',
    );
    assert.equal((await change({ ust: person.ust }, { newPassword: password() })).reason, 'INVALID_REQUEST');
    assert.equal(
      (await change({ ust: person.ust, key: key() }, { newPassword: password(), userId: chief.userId }))
        .reason,
      'SUPER_USER_REQUIRED',
    );
    assert.equal(
      (await change({ ust: plant('token') }, { oldPassword: password(), newPassword: password() })).reason,
      'SESSION_INVALID',
    );
    assert.equal(
      (await change({ ust: chief.ust, key: key() }, { newPassword: password(), userId: person.userId }))
        .reason,
      'OK',
    );
    // Where they do not belong.
    await change(
      { ust: chief.ust },
      { newPassword: password(), userId: plant('token').replaceAll('-', ' ') },
    );
    await change({ ust: plant('token').repeat(20), key: key().repeat(9) }, { newPassword: password() });
    await change({ ust: `${plant('token')}\u00e9` }, { newPassword: password() }).catch(() => {});
  });

  await t.test('sessions', async () => {
    const person = await newPerson();
    await logIn(person.username, password());
    await logIn(plant('password in the place of a username'), password());
    const ust = await logIn(person.username, person.current);
    assert.notEqual(ust, '');
    assert.notEqual(await logIn(person.username, person.current, password()), '');
    const gone = await heard(async () => {
      await caller.sessions.getSession({}, { headers: { app: 'CRM', ust } });
      return '';
    });
    assert.equal(gone.reason, 'SESSION_INVALID');
    keepError(gone.error);
  });

  await t.test('malformed requests', async () => {
    const { ust, current } = await newPerson();
    const message = Buffer.from(
      toBinary(
        ChangePasswordRequestSchema,
        create(ChangePasswordRequestSchema, { oldPassword: current, newPassword: password() }),
      ),
    );
    const login = Buffer.from(
      toBinary(LoginRequestSchema, create(LoginRequestSchema, { username: 'x', password: password() })),
    );
    const metadata = { app: 'CRM', ust, 'idempotency-key': key() };
    const badText = Buffer.concat([
      Buffer.from([0x12, 0x10]),
      Buffer.from(password().slice(0, 15)),
      Buffer.from([0xff]),
    ]);
    const truncated = message.subarray(0, message.length - 3);
    const oversized = Buffer.concat([
      message,
      Buffer.from([0x12, 0xff, 0xff, 0x03]),
      Buffer.alloc(65_535, password()),
    ]);
    for (const bytes of [
      badText,
      truncated,
      oversized,
      Buffer.from(password()),
      Buffer.concat([message, badText]),
    ]) {
      await raw(CHANGE, bytes, metadata);
      await raw(LOGIN, Buffer.concat([login, bytes]), { app: 'CRM' });
    }
    await raw(CHANGE, message, { ...metadata, ust: [ust, plant('token')] });
    await raw(CHANGE, message, { ...metadata, 'idempotency-key': [key(), key()] });
    await raw(CHANGE, message, { ...metadata, cid: ['a', 'b'] });
    await raw(CHANGE, message, { ust });
    await raw(CHANGE, message, { ...metadata, app: 'nobody' });
    await raw('/rekey.v1.UserService/NoSuchMethod', message, metadata);
    await raw('/no.such.Service/ChangePassword', message, metadata);
  });

  await t.test('defects: INTERNAL', async () => {
    const person = await newPerson();
    const db = await stage.connect();
    await db.query('RENAME TABLE audit_log TO audit_log_gone');
    const request = { oldPassword: person.current, newPassword: password() };
    assert.equal((await change({ ust: person.ust, key: key() }, request)).reason, 'INTERNAL');
    await logIn(person.username, person.current);
    await db.query('RENAME TABLE audit_log_gone TO audit_log');
    for (const hash of [
      '',
      'no hash at all',
      '$argon2id$v=19$m=8,t=1,p=1$AAAA',
      '$argon2id$v=19$m=8,t=1,p=1,keyid=Z29uZQ$c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaA',
    ]) {
      await db.query('UPDATE users SET password_hash = ? WHERE user_id = ?', [hash, person.userId]);
      await change({ ust: person.ust, key: key() }, { oldPassword: password(), newPassword: password() });
      await logIn(person.username, password());
    }
    db.destroy();
  });

  await t.test('faults and crashes at every command', async () => {
    for (const fate of ['cut-before', 'cut-during', 'cut-after', 'swallow'] as const) {
      for (let place = 1; place <= 6; place += fate === 'swallow' ? 3 : 1) {
        const person = await newPerson();
        let left = 1;
        let seen = 0;
        stage.proxy.decide = () => (++seen === place && left-- > 0 ? fate : 'pass');
        const request = { oldPassword: person.current, newPassword: password() };
        await change({ ust: person.ust, key: key() }, request);
        stage.proxy.decide = undefined;
      }
    }
    for (const victim of ['server', 'database'] as const) {
      for (let place = 1; place <= 6; place += 2) {
        const person = await newPerson();
        let ended: Promise<unknown> | undefined;
        let seen = 0;
        await keepTraces();
        stage.proxy.decide = () => {
          if (++seen !== place || ended) return 'pass';
          ended = victim === 'server' ? server.end('SIGKILL') : database.kill();
          return 'cut-before';
        };
        const answer = change(
          { ust: person.ust, key: key() },
          { oldPassword: person.current, newPassword: password() },
        );
        // An answer may come before the command that was waited for.
        let isAnswered = false;
        answer.then(() => {
          isAnswered = true;
        });
        while (!ended && !isAnswered) await sleep(2);
        await ended;
        stage.proxy.decide = undefined;
        await restart();
        await answer;
      }
    }
    // The last words of a process that aborts, and of one that ends in good order with a call under way.
    const person = await newPerson();
    for (const signal of ['SIGABRT', 'SIGTERM'] as const) {
      stage.proxy.decide = () => 'swallow';
      const answer = change(
        { ust: person.ust, key: key() },
        { oldPassword: person.current, newPassword: password() },
      );
      await sleep(100);
      await keepTraces();
      await server.end(signal);
      stage.proxy.decide = undefined;
      await server.start();
      await answer;
    }
  });

  await t.test('deadlines and callers that go away', async () => {
    const person = await newPerson();
    for (let attempt = 0; attempt < 6; attempt++) {
      const answer = await heard(async () => {
        const give =
          attempt % 2 === 0 ? { timeoutMs: 1 + attempt } : { signal: AbortSignal.timeout(1 + attempt) };
        const headers = { app: 'CRM', ust: person.ust, 'idempotency-key': key() };
        await caller.users.changePassword(
          { oldPassword: password(), newPassword: password() },
          { headers, ...give },
        );
        return '';
      });
      keepError(answer.error);
    }
  });

  await t.test('the command line', async () => {
    const person = await newPerson();
    const run = async (args: string[], input: string, ust = '') => {
      const child = spawn(
        process.execPath,
        [join(PROJECT, 'src/main.ts'), ...args, '--server', server.url, '--app', 'CRM'],
        {
          env: { ...process.env, ...(ust === '' ? {} : { REKEY_UST: ust }) },
          stdio: ['pipe', 'pipe', 'pipe'],
        },
      );
      const parts: string[] = [];
      for (const stream of [child.stdout, child.stderr])
        stream.setEncoding('utf8').on('data', (text: string) => parts.push(text));
      commandLines.push(await readFile(`/proc/${child.pid}/cmdline`, 'utf8').catch(() => ''));
      child.stdin.end(input);
      const [code] = await once(child, 'close');
      outputs.push(parts.join(''));
      return code;
    };
    const next = password();
    const change = ['change-password', '--password-stdin'];
    assert.equal(await run(change, `${person.current}\n${next}\n`, person.ust), 0, outputs.at(-1));
    assert.notEqual(await run(change, `${password()}\n${password()}\n`, person.ust), 0);
    assert.notEqual(await run(['login', person.username, '--password-stdin'], `${password()}\n`), 0);
  });
  await keepTraces();
});

test('not one of them is in a log, an error, a metric, an audit record or a command line', async (t) => {
  await server.end('SIGTERM');
  const hits = [
    ...hitsIn(server.lines.join('\n'), "the server's output"),
    ...hitsIn(errors.join('\n'), 'an error'),
    ...hitsIn(metrics.join('\n'), 'the metrics'),
    ...hitsIn(commandLines.join('\n'), 'a command line'),
    ...hitsIn(outputs.join('\n'), 'the output of the command line'),
  ];
  const db = await stage.connect();
  const [tables] = await db.query<RowDataPacket[]>(
    'SELECT table_name AS name FROM information_schema.tables WHERE table_schema = DATABASE()',
  );
  let cells = 0;
  let keysFound = 0;
  for (const { name } of tables) {
    const [rows] = await db.query<RowDataPacket[]>(`SELECT * FROM \`${name}\``);
    for (const row of rows) {
      for (const [column, value] of Object.entries(row)) {
        if (value === null || typeof value === 'number') continue;
        cells++;
        const text = Buffer.isBuffer(value)
          ? value
          : typeof value === 'object'
            ? JSON.stringify(value)
            : String(value);
        if (hitsIn(text, '').length > 0) keysFound++;
        const isKeys = name === 'idempotency_records' && column === 'idempotency_key';
        hits.push(...hitsIn(text, `${name}.${column}`, ({ kind }) => isKeys && kind === 'key'));
      }
    }
  }
  db.destroy();
  t.diagnostic(
    `${canaries.length} canaries; ${server.lines.length} lines of output, ${errors.length} errors, ${metrics.length} times the metrics, ` +
      `${commandLines.length} command lines, ${cells} database cells: ${hits.length} hits`,
  );
  assert.deepEqual(hits, []);
  assert.ok(keysFound > 0, 'the search finds what is there');
  assert.ok(errors.length > 30 && server.lines.length > 60 && metrics.length > 5 && cells > 500);
});

test("not one of them is in the database's files, but the keys that are kept", async (t) => {
  await database.stop();
  const hits: string[] = [];
  let bytes = 0;
  const files = await readdir(database.dataDirectory, { recursive: true, withFileTypes: true });
  const forms = canaries
    .filter(({ kind }) => kind !== 'key' && kind !== 'database password')
    .map((canary) => ({ canary, forms: formsOf(canary).slice(0, 2) }));
  // A prefix that only canaries have makes one pass over each file enough.
  const OVERLAP = 256;
  for (const file of files.filter((entry) => entry.isFile())) {
    const path = join(file.parentPath, file.name);
    let rest: Buffer = Buffer.alloc(0);
    for await (const chunk of createReadStream(path, { highWaterMark: 4 << 20 })) {
      const part: Buffer = Buffer.concat([rest, chunk as Buffer]);
      bytes += (chunk as Buffer).length;
      const hasCanary = part.includes('canary');
      for (const { canary, forms: texts } of forms) {
        if (!hasCanary && canary.text.startsWith('canary')) continue;
        const mustBeLookedFor = canary.kind === 'password in the place of a username';
        if (mustBeLookedFor && file.name === GENERAL_LOG) continue;
        if (texts.some((text) => part.includes(text)))
          hits.push(`${canary.kind} ${canary.text} in ${file.name}`);
      }
      rest = part.subarray(-OVERLAP);
    }
  }
  t.diagnostic(`${Math.round(bytes / 1e6)} MB searched: ${hits.length} hits`);
  assert.deepEqual([...new Set(hits)], []);
});
