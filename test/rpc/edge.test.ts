import assert from 'node:assert/strict';
import { execFile, execFileSync } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import type { ClientHttp2Session } from 'node:http2';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { create, fromBinary, toBinary } from '@bufbuild/protobuf';
import { BinaryReader, BinaryWriter, WireType } from '@bufbuild/protobuf/wire';
import {
  type FileDescriptorProto,
  FileDescriptorProtoSchema,
  FileDescriptorSetSchema,
} from '@bufbuild/protobuf/wkt';
import { ChangePasswordRequestSchema } from '../../gen/rekey/v1/user_service_pb.ts';
import { createTestDatabase, freePort } from '../support/private_database.ts';
import { framed, rawCall, rawConnect } from '../support/raw_http2.ts';
import {
  assertNoSecret,
  type ChangeMessage,
  checkHealth,
  type Environment,
  eventually,
  type HealthStatus,
  healthClient,
  type ServerProcess,
  type Service,
  spawnRekey,
  startService,
  strongPassword,
  type TestUser,
} from '../support/service.ts';

const run = promisify(execFile);
const SERVICES = ['', 'rekey.v1.UserService', 'rekey.v1.SessionService'];

const change = (
  server: ServerProcess,
  user: TestUser,
  message: Partial<ChangeMessage> = {},
  cid: string = randomUUID(),
) =>
  server.change(
    { ust: user.ust, app: 'CRM', cid },
    { oldPassword: user.password, newPassword: strongPassword(), ...message },
  );

describe('health', () => {
  it('is SERVING while the database answers, and NOT_SERVING without it and while stopping', async () => {
    const service = await startService({}, { gated: true });
    const health = healthClient(service.server.address);
    try {
      const seen: HealthStatus[] = [];
      const watch = health.watch({ service: 'rekey.v1.UserService' });
      const watching = (async () => {
        for await (const { status } of watch) seen.push(status);
      })().catch(() => {});
      const last = (status: HealthStatus) =>
        eventually(`the watcher hears ${status}`, () => seen.at(-1) === status);

      await last('SERVING');
      for (const name of SERVICES) assert.equal(await checkHealth(service.server.address, name), 'SERVING');
      assert.equal(await checkHealth(service.server.address, 'nobody.v1.Knows'), undefined);

      await service.gate?.shut();
      await last('NOT_SERVING');
      for (const name of SERVICES)
        assert.equal(await checkHealth(service.server.address, name), 'NOT_SERVING');
      await service.server.waitFor('the log says why', ({ msg }) => msg.startsWith('not serving'));

      await service.gate?.open();
      await last('SERVING');
      service.server.signal('SIGTERM');
      await last('NOT_SERVING');
      watch.cancel();
      health.close();
      assert.deepEqual(await service.server.exited, { code: 0, signal: null });
      await watching;
      assert.deepEqual(seen, ['SERVING', 'NOT_SERVING', 'SERVING', 'NOT_SERVING']);
    } finally {
      health.close();
      await service.stop();
    }
  });

  it('is NOT_SERVING while the database takes connections and says nothing', async () => {
    const service = await startService({}, { gated: true });
    try {
      service.gate?.stall();
      await service.server.waitForHealth('NOT_SERVING');
      await service.gate?.open();
      await service.server.waitForHealth('SERVING');
    } finally {
      await service.stop();
    }
  });
});

describe('starting', () => {
  it('goes without a database, and serves once it is there', async () => {
    const service = await startService({}, { gated: true });
    try {
      await service.gate?.shut();
      const server = await service.startServer();
      await server.waitForHealth('NOT_SERVING');
      const me = await service.createUser();
      const metadata = { ust: me.ust, app: 'CRM' };
      const message = { oldPassword: me.password, newPassword: strongPassword() };
      const away = await server.change(metadata, message, { timeoutMs: 1000 });
      assert.ok(['UNAVAILABLE', 'DEADLINE_EXCEEDED'].includes(away.code), away.code);
      await service.gate?.open();
      await server.waitForHealth('SERVING');
      assert.equal((await server.change(metadata, message)).code, 'OK');
    } finally {
      await service.stop();
    }
  });

  async function refusal(environment: Environment, args: string[] = []): Promise<string> {
    const { exited, lines, stderr } = spawnRekey(['serve', ...args], {
      REKEY_LISTEN: '127.0.0.1:0',
      REKEY_APPS: 'CRM',
      REKEY_LOG_FORMAT: 'json',
      ...environment,
    });
    const { code } = await exited;
    assert.notEqual(code, 0, lines.join('\n'));
    assert.doesNotMatch(stderr(), /^\s+at /m, 'a sentence and no stack');
    return stderr();
  }

  it('is refused on an older and on a newer schema, with a sentence that says what to do', async () => {
    const empty = await createTestDatabase();
    try {
      assert.match(
        await refusal({ REKEY_DATABASE_URL: empty.url }),
        /^The database has schema version 0.*rekey migrate/,
      );
    } finally {
      await empty.drop();
    }
    const service = await startService();
    try {
      await service.sql("INSERT INTO schema_migrations VALUES (9999, '9999_future.sql', UTC_TIMESTAMP(6))");
      const said = await refusal({ REKEY_DATABASE_URL: service.databaseUrl });
      assert.match(said, /schema version 9999, made by a newer rekey/);
    } finally {
      await service.stop();
    }
  });

  it('is refused with every mistake of the configuration at once', async () => {
    const said = await refusal({ REKEY_APPS: '', REKEY_POLICY_MIN_LENGTH: 'nine', REKEY_NO_SUCH_KEY: '1' });
    for (const key of ['apps', 'database.url', 'policy.min_length', 'REKEY_NO_SUCH_KEY']) {
      assert.ok(said.includes(key), `${key} in ${said}`);
    }
  });
});

describe('reflection', () => {
  let service: Service;
  before(async () => {
    service = await startService();
  });
  after(() => service.stop());

  const ours = fromBinary(
    FileDescriptorSetSchema,
    readFileSync(new URL('../../gen/rekey.binpb', import.meta.url)),
  ).file;

  /** One question of ServerReflectionRequest, by its field; the response's submessage, by its field. */
  async function ask(version: string, field: number, value: string): Promise<Map<number, Uint8Array>> {
    const session = await rawConnect(service.server.address);
    const request = new BinaryWriter().tag(field, WireType.LengthDelimited).string(value).finish();
    const { body, status } = await rawCall(session, {}, framed(request), {
      path: `/grpc.reflection.${version}.ServerReflection/ServerReflectionInfo`,
    });
    session.destroy();
    assert.equal(status, 0);
    return new Map(submessages(body.subarray(5)));
  }

  function submessages(bytes: Uint8Array): [number, Uint8Array][] {
    const reader = new BinaryReader(bytes);
    const found: [number, Uint8Array][] = [];
    while (reader.pos < reader.len) {
      const [field, wireType] = reader.tag();
      if (wireType === WireType.LengthDelimited) found.push([field, reader.bytes()]);
      else reader.skip(wireType, field);
    }
    return found;
  }

  const FILE_BY_NAME = 3;
  const FILE_OF_SYMBOL = 4;
  const LIST_SERVICES = 7;
  const FILES = 4;
  const LIST = 6;

  const filesOf = (answer: Map<number, Uint8Array>): FileDescriptorProto[] =>
    submessages(answer.get(FILES) ?? new Uint8Array()).map(([, bytes]) =>
      fromBinary(FileDescriptorProtoSchema, bytes),
    );

  for (const version of ['v1', 'v1alpha']) {
    it(`${version} lists the services`, async () => {
      const list = (await ask(version, LIST_SERVICES, '')).get(LIST) as Uint8Array;
      const names = submessages(list).map(([, bytes]) =>
        Buffer.from(submessages(bytes)[0]?.[1] ?? []).toString(),
      );
      assert.deepEqual(names.filter((name) => !name.startsWith('grpc.reflection')).sort(), [
        'grpc.health.v1.Health',
        'rekey.v1.SessionService',
        'rekey.v1.UserService',
      ]);
    });

    it(`${version} describes grpc.health.v1, too`, async () => {
      const files = filesOf(await ask(version, FILE_OF_SYMBOL, 'grpc.health.v1.Health'));
      assert.ok(files.some((file) => file.service.some(({ name }) => name === 'Health')));
    });

    it(`${version} serves the descriptors as they were built: names, presence, redaction and comments`, async () => {
      for (const file of ours) {
        const [served] = filesOf(await ask(version, FILE_BY_NAME, file.name)).filter(
          ({ name }) => name === file.name,
        );
        assert.ok(served, file.name);
        assert.deepEqual(
          toBinary(FileDescriptorProtoSchema, served),
          toBinary(FileDescriptorProtoSchema, file),
        );
      }
      const [users] = filesOf(await ask(version, FILE_OF_SYMBOL, 'rekey.v1.UserService')).filter(
        ({ name }) => name === 'rekey/v1/user_service.proto',
      );
      const request = users?.messageType.find(({ name }) => name === 'ChangePasswordRequest');
      assert.deepEqual(
        request?.field.map(({ name, proto3Optional, options }) => [
          name,
          proto3Optional,
          options?.debugRedact ?? false,
        ]),
        [
          ['old_password', true, true],
          ['new_password', false, true],
          ['user_id', true, false],
          ['password_expiry', true, false],
          ['must_change', true, false],
          ['validate_only', true, false],
        ],
      );
      assert.ok(
        users?.sourceCodeInfo?.location.some(({ leadingComments }) =>
          leadingComments.includes('UserService changes passwords.'),
        ),
      );
    });
  }

  it('is enough for a client that knows nothing else', async () => {
    const buf = fileURLToPath(new URL('../../node_modules/.bin/buf', import.meta.url));
    const me = await service.createUser();
    const url = `http://${service.server.address}/rekey.v1.UserService/ChangePassword`;
    const body = JSON.stringify({ old_password: me.password, new_password: strongPassword() });
    const { stdout } = await run(buf, [
      ...['curl', '--protocol', 'grpc', '--http2-prior-knowledge', '-H', `ust: ${me.ust}`, '-H', 'app: CRM'],
      ...['-d', body, url],
    ]);
    assert.match(JSON.parse(stdout).passwordExpiryTime, /^\d{4}-\d\d-\d\dT/);
  });

  it('can be switched off', async () => {
    const server = await service.startServer({ REKEY_REFLECTION: 'false' });
    const session = await rawConnect(server.address);
    for (const version of ['v1', 'v1alpha']) {
      const { status } = await rawCall(session, {}, framed(new Uint8Array()), {
        path: `/grpc.reflection.${version}.ServerReflection/ServerReflectionInfo`,
      });
      assert.equal(status, 12, 'UNIMPLEMENTED');
    }
    session.destroy();
    await server.stop();
  });
});

const OPENSSL = (() => {
  try {
    execFileSync('openssl', ['version'], { stdio: 'ignore' });
    return true;
  } catch {
    return false;
  }
})();

describe('TLS', { skip: OPENSSL ? false : 'openssl is not installed: TLS was not tested' }, () => {
  const directory = mkdtempSync(join(tmpdir(), 'rekey-tls-'));
  const path = (name: string) => join(directory, name);
  const openssl = (...args: string[]) => run('openssl', args);
  let service: Service;

  async function certificate(name: string, ca: string | undefined): Promise<void> {
    const key = [
      '-newkey',
      'ec',
      '-pkeyopt',
      'ec_paramgen_curve:prime256v1',
      '-nodes',
      '-keyout',
      path(`${name}.key`),
    ];
    const common = [
      'req',
      '-x509',
      '-days',
      '2',
      '-subj',
      `/CN=${name}`,
      '-out',
      path(`${name}.pem`),
      ...key,
    ];
    const issuer = ca ? ['-CA', path(`${ca}.pem`), '-CAkey', path(`${ca}.key`)] : [];
    const use = ca ? ['-addext', 'basicConstraints=critical,CA:FALSE'] : [];
    await openssl(...common, ...issuer, ...use, '-addext', 'subjectAltName=IP:127.0.0.1,DNS:localhost');
  }

  before(async () => {
    await certificate('ca', undefined);
    await certificate('otherca', undefined);
    await certificate('server', 'ca');
    await certificate('client', 'ca');
    await certificate('stranger', 'otherca');
    service = await startService();
  });
  after(async () => {
    rmSync(directory, { recursive: true });
    await service.stop();
  });

  const ca = () => readFileSync(path('ca.pem'));
  const pair = (name: string) => ({
    cert: readFileSync(path(`${name}.pem`)),
    key: readFileSync(path(`${name}.key`)),
  });
  const serverFiles = () => ({
    REKEY_TLS_CERTIFICATE_FILE: path('server.pem'),
    REKEY_TLS_KEY_FILE: path('server.key'),
  });

  it('proves who the server is', async () => {
    const server = await service.startServer(serverFiles(), { tls: { ca: ca() } });
    assert.equal((await change(server, await service.createUser())).code, 'OK');
    await server.stop();
    const other = await service.startServer(serverFiles(), {
      tls: { ca: readFileSync(path('otherca.pem')) },
    });
    assert.notEqual((await change(other, await service.createUser())).code, 'OK');
    await other.stop();
  });

  it('lets in only whom the authority vouches for, where it is mutual', async () => {
    const mutual = { ...serverFiles(), REKEY_TLS_CLIENT_CA_FILE: path('ca.pem') };
    const known = await service.startServer(mutual, { tls: { ca: ca(), ...pair('client') } });
    assert.equal((await change(known, await service.createUser())).code, 'OK');
    await known.stop();
    for (const tls of [{ ca: ca() }, { ca: ca(), ...pair('stranger') }]) {
      const server = await service.startServer(mutual, { tls });
      const me = await service.createUser();
      assert.notEqual((await change(server, me)).code, 'OK');
      assert.ok(await service.isPassword(me.userId, me.password));
      await server.stop();
    }
  });

  it('is not to be had in plain text', async () => {
    const server = await service.startServer(serverFiles());
    assert.notEqual((await change(server, await service.createUser())).code, 'OK');
    await server.stop();
  });
});

describe('what no client library would send', () => {
  let service: Service;
  let session: ClientHttp2Session;
  let me: TestUser;
  before(async () => {
    service = await startService();
    session = await rawConnect(service.server.address);
    me = await service.createUser();
  });
  after(async () => {
    session.destroy();
    await service.stop();
  });

  const metadata = (more: Record<string, string | string[]> = {}) => ({ ust: me.ust, app: 'CRM', ...more });
  const encoded = (message: ChangeMessage) =>
    toBinary(ChangePasswordRequestSchema, create(ChangePasswordRequestSchema, message));
  const valid = () =>
    encoded({ oldPassword: me.password, newPassword: strongPassword(), validateOnly: true });
  const field = (number: number, bytes: number[]) =>
    new BinaryWriter().tag(number, WireType.LengthDelimited).bytes(new Uint8Array(bytes)).finish();
  const INVALID_ARGUMENT = 3;
  const DEADLINE_EXCEEDED = 4;
  const RESOURCE_EXHAUSTED = 8;
  const INTERNAL = 13;

  const broken: [string, Uint8Array][] = [
    ['invalid UTF-8 in old_password', field(1, [0x61, 0xff, 0x62])],
    ['invalid UTF-8 in new_password', field(2, [0xc3, 0x28])],
    ['a lone surrogate in new_password', field(2, [0xed, 0xa0, 0x80])],
    ['an overlong encoding in new_password', field(2, [0xc0, 0x80])],
    ['invalid UTF-8 in user_id', field(3, [0x80])],
    ['a string that ends before its length', new Uint8Array([0x12, 0x10, 0x61])],
    ['a tag without a field', new Uint8Array([0x00])],
    ['a varint without an end', new Uint8Array([0x20, 0xff, 0xff, 0xff])],
    ['a string where a number belongs', field(4, [0x61, 0x62])],
    ['a number where a string belongs', new Uint8Array([0x10, 0x05])],
    ['a group that never ends', new Uint8Array([0x53])],
  ];
  for (const [what, bytes] of broken) {
    it(`${what} is INVALID_ARGUMENT`, async () => {
      const answer = await rawCall(session, metadata({ cid: `broken-${what.length}` }), framed(bytes));
      assert.equal(answer.status, INVALID_ARGUMENT);
      assert.equal(answer.errorInfo?.reason, 'INVALID_REQUEST');
      assert.deepEqual(answer.violations, ['message MALFORMED']);
      assert.equal(answer.headers?.cid, `broken-${what.length}`);
    });
  }

  it('unknown fields are passed over', async () => {
    const bytes = Buffer.concat([valid(), field(15, [1, 2, 3]), new Uint8Array([0x98, 0x06, 0x01])]);
    assert.equal((await rawCall(session, metadata(), framed(bytes))).status, 0);
  });

  it('the cid is echoed in the initial metadata, on OK and on errors', async () => {
    for (const app of ['CRM', 'MRP']) {
      const answer = await rawCall(session, { ...metadata({ cid: `echo-${app}` }), app }, framed(valid()));
      assert.equal(answer.headers?.cid, `echo-${app}`);
      assert.equal(answer.headers?.[':status'], 200);
    }
  });

  it('metadata that is sent twice is INVALID_ARGUMENT', async () => {
    for (const key of ['ust', 'app', 'cid', 'remote-addr', 'idempotency-key']) {
      const value = { ust: me.ust, app: 'CRM', 'remote-addr': '192.0.2.1' }[key] ?? 'x';
      const answer = await rawCall(session, metadata({ [key]: [value, value] }), framed(valid()));
      assert.deepEqual([answer.status, answer.violations], [INVALID_ARGUMENT, [`${key} DUPLICATE`]]);
    }
  });

  it('metadata that is not printable ASCII is INVALID_ARGUMENT, and is nowhere to be seen', async () => {
    for (const key of ['ust', 'app', 'cid', 'remote-addr', 'idempotency-key']) {
      for (const sign of ['é', '\u00e2\u0080\u00a8', '\t\u00ff']) {
        const value = `canary-${key}${sign}x`;
        service.secrets.add(`canary-${key}`);
        const answer = await rawCall(session, metadata({ [key]: value }), framed(valid()));
        assert.deepEqual([answer.status, answer.violations], [INVALID_ARGUMENT, [`${key} MALFORMED`]]);
      }
    }
  });

  it('no metadata makes more than one line of log, or a line of its own', async () => {
    const cids = ['{"level":"fatal"}', '\\r\\n{"msg":"x"}', '\\u001b[31m', "'; -- %s %n $HOME"];
    for (const cid of cids) {
      const answer = await rawCall(session, metadata({ cid }), framed(valid()));
      assert.equal(answer.status, 0);
      await service.server.lineOf(cid);
      assert.equal(service.server.log.filter((line) => line.cid === cid).length, 1);
    }
    assert.ok(service.server.lines.every((line) => !/[^\x20-\x7e\u00a0-\uffff]/.test(line)));
  });

  it('a grpc-timeout of 0m is DEADLINE_EXCEEDED, and no work is begun', async () => {
    const body = framed(encoded({ oldPassword: strongPassword(), newPassword: strongPassword() }));
    const answer = await rawCall(session, metadata({ 'grpc-timeout': '0m', cid: 'dead' }), body);
    assert.equal(answer.status, DEADLINE_EXCEEDED);
    const [row] = await service.sql('SELECT old_password_attempts AS n FROM users WHERE user_id = ?', [
      me.userId,
    ]);
    assert.equal(row?.n, 0);
    assert.deepEqual(await service.auditOf('dead'), []);
  });

  it('a grpc-timeout that is longer than any timer is as good as none', async () => {
    for (const timeout of ['99999999H', '99999999M', '596524H', '99999999S', '2147484S']) {
      const answer = await rawCall(session, metadata({ 'grpc-timeout': timeout }), framed(valid()));
      assert.equal(answer.status, 0, timeout);
    }
  });

  it('a grpc-timeout that is none is refused', async () => {
    for (const timeout of ['5', 'S', '-5S', '123456789S', '5 S', '1e3S']) {
      const answer = await rawCall(session, metadata({ 'grpc-timeout': timeout }), framed(valid()));
      assert.equal(answer.status, INTERNAL, timeout);
    }
  });

  it('a deadline is kept by the server, whatever the client does about it', async () => {
    const hash = await service.storedHash(me.userId);
    const body = framed(encoded({ oldPassword: me.password, newPassword: strongPassword() }));
    const answer = await service.whileLocked(me.userId, () =>
      rawCall(session, metadata({ 'grpc-timeout': '300m' }), body),
    );
    assert.ok([DEADLINE_EXCEEDED, 14].includes(answer.status as number), String(answer.status));
    assert.equal(await service.storedHash(me.userId), hash);
  });

  it('a message of more than 16 KiB is RESOURCE_EXHAUSTED, however it is announced', async () => {
    const huge = encoded({ oldPassword: me.password, newPassword: 'Xk4-'.repeat(5000) });
    assert.equal((await rawCall(session, metadata(), framed(huge))).status, RESOURCE_EXHAUSTED);
    const announced = framed(new Uint8Array(10), { length: 0xffffffff });
    assert.equal((await rawCall(session, metadata(), announced)).status, RESOURCE_EXHAUSTED);
    const answer = await service.server.change(metadata() as never, { newPassword: 'Xk4-'.repeat(5000) });
    assert.equal(answer.code, 'RESOURCE_EXHAUSTED');
  });

  it('metadata of more than 8 KiB is refused, and the server goes on', async () => {
    const own = await rawConnect(service.server.address);
    const answer = await rawCall(own, metadata({ padding: 'p'.repeat(9000) }), framed(valid())).catch(
      () => undefined,
    );
    assert.notEqual(answer?.status, 0);
    own.destroy();
    assert.equal((await rawCall(session, metadata(), framed(valid()))).status, 0);
  });

  it('a connection has at most 100 calls at a time', async () => {
    const own = await rawConnect(service.server.address);
    await eventually('the settings arrive', () => own.remoteSettings.maxConcurrentStreams === 100);
    own.destroy();
  });

  it('odd authorities, paths and content types end no process', async () => {
    for (const headers of [
      { ':authority': 'localhost:99999' },
      { ':authority': '[::g' },
      { 'content-type': 'text/html' },
      { 'grpc-encoding': 'snappy' },
    ]) {
      const own = await rawConnect(service.server.address);
      await rawCall(own, metadata(headers), framed(valid()));
      own.destroy();
    }
    for (const path of ['/', '/rekey.v1.UserService', '/rekey.v1.UserService/Nothing', '//x/../y%00']) {
      const own = await rawConnect(service.server.address);
      const answer = await rawCall(own, metadata(), framed(valid()), { path });
      assert.notEqual(answer.status, 0);
      own.destroy();
    }
    assert.equal((await rawCall(session, metadata(), framed(valid()))).status, 0);
  });
});

describe('stopping and reloading', () => {
  it('SIGTERM under load cuts no call within the grace period', async () => {
    const service = await startService({ REKEY_HASH_MEMORY_KIB: '16384', REKEY_HASH_ITERATIONS: '2' });
    try {
      const people = await Promise.all(Array.from({ length: 30 }, () => service.createUser()));
      const calls = people.map((me) => change(service.server, me));
      await Promise.race(calls);
      service.server.signal('SIGTERM');
      const answers = await Promise.all(calls);
      assert.deepEqual(
        answers.filter(({ code }) => code !== 'OK').map(({ code, message }) => `${code} ${message}`),
        [],
      );
      const late = await change(service.server, people[0] as TestUser);
      assert.equal(late.code, 'UNAVAILABLE');
      assert.deepEqual(await service.server.exited, { code: 0, signal: null });
      assert.ok(service.server.log.some(({ msg }) => msg === 'stopped'));
      assert.ok(!service.server.log.some(({ msg }) => msg.includes('cut off')));
      for (const { cid } of answers) assert.equal((await service.auditOf(cid as string))[0]?.outcome, 'ok');
    } finally {
      await service.stop();
    }
  });

  it('a call that outlasts the grace period is cut off, and the process ends all the same', async () => {
    const service = await startService({
      REKEY_LIMITS_SHUTDOWN_GRACE_SECONDS: '1',
      REKEY_DATABASE_LOCK_WAIT_TIMEOUT_SECONDS: '60',
      REKEY_DATABASE_STATEMENT_TIMEOUT_MS: '60000',
    });
    try {
      const me = await service.createUser();
      const call = await service.whileLocked(me.userId, async () => {
        const pending = change(service.server, me);
        await service.waitForLockWaits();
        service.server.signal('SIGTERM');
        assert.equal((await service.server.exited).code, 0);
        return { pending };
      });
      assert.notEqual((await call.pending).code, 'OK');
      await service.server.waitFor('the log says so', ({ msg }) => msg.includes('cut off'));
      assert.ok(await service.isPassword(me.userId, me.password));
    } finally {
      await service.stop();
    }
  });

  it('SIGHUP takes over the policy; a file with mistakes leaves the old one and says so', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'rekey-config-'));
    const file = join(directory, 'rekey.toml');
    const policy = (text: string) => writeFileSync(file, text);
    const service = await startService();
    try {
      policy('[policy]\nmin_length = 8\n');
      const server = await service.startServer({}, { args: ['--config', file] });
      const me = await service.createUser();
      const limit = async () => {
        const answer = await change(server, me, { newPassword: 'k', validateOnly: true });
        return answer.metadata.min_length;
      };
      assert.equal(await limit(), '8');

      policy('[policy]\nmin_length = 20\n');
      server.signal('SIGHUP');
      await server.waitFor('reloaded', ({ msg }) => msg === 'policy reloaded');
      assert.equal(await limit(), '20');

      const bad = ['policy = [\n', '[policy]\nmin_length = "many"\nmax_lenght = 9\n'];
      for (const [index, text] of bad.entries()) {
        policy(text);
        server.signal('SIGHUP');
        const isRefusal = ({ msg }: { msg: string }) => msg.startsWith('policy not reloaded');
        await eventually('told off', () => server.log.filter(isRefusal).length === index + 1);
        const line = server.log.findLast(isRefusal);
        assert.equal(line?.level, 'error');
        assert.ok((line.problems as string[]).length >= 1);
        assert.equal(await limit(), '20');
      }
      rmSync(file);
      server.signal('SIGHUP');
      await sleep(100);
      assert.equal(await limit(), '20');
      policy('[policy]\nmin_length = 9\n');
      server.signal('SIGHUP');
      await eventually('the mended file', async () => (await limit()) === '9');
    } finally {
      await service.stop();
      rmSync(directory, { recursive: true });
    }
  });
});

it('metrics hold no secret and count every call', async () => {
  const port = await freePort();
  const service = await startService({ REKEY_METRICS_LISTEN: `127.0.0.1:${port}` });
  try {
    const me = await service.createUser();
    assert.equal((await change(service.server, me)).code, 'OK');
    assert.equal((await change(service.server, me)).reason, 'OLD_PASSWORD_MISMATCH');
    const text = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
    assert.match(text, /rekey_calls_total\{method="ChangePassword",code="OK",reason=""\} 1\n/);
    assert.match(
      text,
      /rekey_calls_total\{method="ChangePassword",code="PERMISSION_DENIED",reason="OLD_PASSWORD_MISMATCH"\} 1\n/,
    );
    assertNoSecret(text, service.secrets, 'the metrics');
  } finally {
    await service.stop();
  }
});
