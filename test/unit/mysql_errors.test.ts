import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import {
  isReadOnly,
  kindOf,
  NoConnection,
  StatementTimeout,
  saysNotCommitted,
} from '../../src/mysql/errors.ts';
import { Refusal } from '../../src/password/errors.ts';

const failed = (fields: { errno?: number; code?: string; fatal?: boolean; sqlState?: string }) =>
  Object.assign(new Error('failed'), fields);
const answered = (errno: number, code: string) => failed({ errno, code, sqlState: 'HY000' });

describe('the kind of an error', () => {
  for (const [what, error, kind] of [
    ['a deadlock', answered(1213, 'ER_LOCK_DEADLOCK'), 'conflict'],
    ['a lock wait timeout', answered(1205, 'ER_LOCK_WAIT_TIMEOUT'), 'conflict'],
    ['a record that has changed', answered(1020, 'ER_CHECKREAD'), 'conflict'],
    ['a conflict of group members', answered(3101, 'ER_TRANSACTION_ROLLBACK_DURING_COMMIT'), 'conflict'],
    ['a read-only server', answered(1290, 'ER_OPTION_PREVENTS_STATEMENT'), 'lost'],
    ['a read-only transaction', answered(1792, 'ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION'), 'lost'],
    ['a read-only mode', answered(1836, 'ER_READ_ONLY_MODE'), 'lost'],
    ['a group without a majority', answered(3100, 'ER_RUN_HOOK_ERROR'), 'lost'],
    ['too many connections', answered(1040, 'ER_CON_COUNT_ERROR'), 'lost'],
    ['a shutdown', answered(1053, 'ER_SERVER_SHUTDOWN'), 'lost'],
    ['a killed query', answered(1317, 'ER_QUERY_INTERRUPTED'), 'lost'],
    ['a killed connection', answered(1927, 'ER_CONNECTION_KILLED'), 'lost'],
    ['a connection closed for being idle', answered(4031, 'ER_CLIENT_INTERACTION_TIMEOUT'), 'lost'],
    ['a killed connection of which only the mark is left', failed({ fatal: true }), 'lost'],
    ['a lost connection', failed({ code: 'PROTOCOL_CONNECTION_LOST', fatal: true }), 'lost'],
    ['a refused connection', failed({ errno: -111, code: 'ECONNREFUSED' }), 'lost'],
    ['a reset connection', failed({ code: 'ECONNRESET' }), 'lost'],
    ['a broken pipe', failed({ code: 'EPIPE' }), 'lost'],
    ['a name that is not found', failed({ code: 'ENOTFOUND' }), 'lost'],
    ['a wrong log-in', failed({ errno: 1045, code: 'ER_ACCESS_DENIED_ERROR', fatal: true }), 'lost'],
    ['a statement that took too long', new StatementTimeout(), 'lost'],
    ['no connection', new NoConnection(undefined), 'lost'],
    ['a duplicate', answered(1062, 'ER_DUP_ENTRY'), 'defect'],
    ['a missing table', answered(1146, 'ER_NO_SUCH_TABLE'), 'defect'],
    ['a syntax error', answered(1064, 'ER_PARSE_ERROR'), 'defect'],
    ['a full disk', answered(1114, 'ER_RECORD_FILE_FULL'), 'defect'],
    ['a mistake of ours', new TypeError('x is not a function'), 'defect'],
    ["a mistake of ours with Node's code", failed({ code: 'ERR_INVALID_ARG_TYPE' }), 'defect'],
    ['a refusal', new Refusal('CONCURRENT_CHANGE'), 'defect'],
    ['no error at all', { errno: 1213 }, 'defect'],
    ['nothing', undefined, 'defect'],
  ] as const) {
    test(`${what}: ${kind}`, () => assert.equal(kindOf(error), kind));
  }
});

describe('after a COMMIT that failed', () => {
  test('the server says that it did not happen only by the errors that roll back', () => {
    for (const errno of [1213, 1205, 1020, 3101, 1290, 1792, 1836, 3100]) {
      assert.ok(saysNotCommitted(answered(errno, 'ER_X')), String(errno));
    }
  });

  test('anything else leaves it open', () => {
    for (const error of [
      failed({ fatal: true }),
      failed({ code: 'PROTOCOL_CONNECTION_LOST', fatal: true }),
      failed({ code: 'ECONNRESET' }),
      new StatementTimeout(),
      ...[1053, 1317, 1927, 1180, 1030, 4031].map((errno) => answered(errno, 'ER_X')),
    ]) {
      assert.ok(!saysNotCommitted(error), String(error.message));
    }
  });

  test('a server that takes no writes is told from one that is away', () => {
    for (const errno of [1290, 1792, 1836, 3100]) assert.ok(isReadOnly(answered(errno, 'ER_X')));
    for (const errno of [1053, 1213, 1062]) assert.ok(!isReadOnly(answered(errno, 'ER_X')));
    assert.ok(!isReadOnly(new StatementTimeout()));
    assert.ok(!isReadOnly(new Refusal('UNAVAILABLE')));
  });
});
