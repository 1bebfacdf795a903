import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createLogger } from '../../src/log.ts';
import { Refusal } from '../../src/password/errors.ts';

const canary = 'cAnArY-55c1';

function logger(log_level: 'trace' | 'info' | 'silent' = 'trace') {
  const lines: string[] = [];
  const log = createLogger({ log_level, log_format: 'json' }, { write: (line) => void lines.push(line) });
  return { log, lines, last: () => JSON.parse(lines.at(-1) ?? '{}') };
}

test('a line is one JSON object with its level by name and its time in UTC', () => {
  const { log, lines, last } = logger();
  log.info({ cid: 'a\r\nb\u2028c\u001b[31m' }, 'one\ntwo');
  assert.equal(lines.length, 1);
  assert.equal(lines[0]?.indexOf('\n'), (lines[0]?.length ?? 0) - 1);
  for (const control of ['\r', '\u001b']) assert.ok(!lines[0]?.includes(control));
  const { level, time, cid, msg } = last();
  assert.deepEqual([level, cid, msg], ['info', 'a\r\nb\u2028c\u001b[31m', 'one\ntwo']);
  assert.match(time, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
});

test('the level is heeded', () => {
  const { log, lines } = logger('info');
  log.debug('not this');
  assert.equal(lines.length, 0);
  logger('silent').log.fatal('nor this');
});

test('passwords, tokens and keys that get here by name are blotted out', () => {
  const { log, lines } = logger();
  for (const name of [
    'password',
    'old_password',
    'new_password',
    'oldPassword',
    'newPassword',
    'ust',
    'idempotencyKey',
  ]) {
    log.info({ [name]: canary }, 'top');
    log.info({ request: { [name]: canary } }, 'inside');
    log.child({ [name]: canary }).info('child');
  }
  assert.equal(lines.length, 21);
  assert.doesNotMatch(lines.join(''), /cAnArY/);
  assert.match(lines.join(''), /\[redacted\]/);
});

test('of an error stays what went wrong, and not what was being worked on', () => {
  const { log, lines, last } = logger();
  const error = Object.assign(new Error('Deadlock found'), {
    code: 'ER_LOCK_DEADLOCK',
    errno: 1213,
    sqlState: '40001',
    sql: `UPDATE users SET password_hash = '${canary}'`,
    sqlMessage: canary,
    values: [canary],
    request: { newPassword: canary },
    config: { password: canary },
  });
  log.error({ err: error }, 'failed');
  assert.doesNotMatch(lines.join(''), /cAnArY/);
  const { err } = last();
  assert.deepEqual(
    [err.type, err.message, err.code, err.errno, err.sqlState],
    ['Error', 'Deadlock found', 'ER_LOCK_DEADLOCK', 1213, '40001'],
  );
  assert.match(err.stack, /log\.test\.ts/);
});

test('causes, and the errors of an aggregate, are told in the same way', () => {
  const { log, lines, last } = logger();
  const inner = () => Object.assign(new Error('the inner one'), { code: 'ECONNREFUSED', sql: canary });
  log.error({ err: new Refusal('UNAVAILABLE', { cause: inner() }) }, 'caused');
  assert.equal(last().err.cause.message, 'the inner one');
  log.error({ err: new AggregateError([inner(), inner()], 'both') }, 'aggregate');
  assert.deepEqual(
    last().err.errors.map((each: { code: string }) => each.code),
    ['ECONNREFUSED', 'ECONNREFUSED'],
  );
  assert.doesNotMatch(lines.join(''), /cAnArY/);
});

test('what is thrown and is no error is told by its type only', () => {
  const { log, lines, last } = logger();
  for (const thrown of [canary, { password: canary }, 42, null]) {
    log.error({ err: thrown }, 'thrown');
    if (thrown !== null) assert.equal(last().err.type, typeof thrown);
  }
  assert.doesNotMatch(lines.join(''), /cAnArY/);
});

test('the details of a refusal are not logged', () => {
  const { log, lines } = logger();
  const refusal = new Refusal('PASSWORD_POLICY', {
    violations: [{ field: 'new_password', reason: 'TOO_SHORT', description: canary }],
    metadata: { canary },
  });
  log.info({ err: refusal }, 'refused');
  assert.doesNotMatch(lines.join(''), /cAnArY/);
});
