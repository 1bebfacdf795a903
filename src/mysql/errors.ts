/**
 * What an error of the database or of the connection to it means for the work that met it.
 * Numbers: https://dev.mysql.com/doc/mysql-errors/9.7/en/server-error-reference.html
 * and https://mariadb.com/docs/server/reference/error-codes
 */

const ER_SERVER_SHUTDOWN = 1053;
const ER_CON_COUNT_ERROR = 1040;
const ER_CHECKREAD = 1020;
const ER_LOCK_WAIT_TIMEOUT = 1205;
const ER_LOCK_DEADLOCK = 1213;
const ER_OPTION_PREVENTS_STATEMENT = 1290;
const ER_QUERY_INTERRUPTED = 1317;
const ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION = 1792;
const ER_READ_ONLY_MODE = 1836;
const ER_CONNECTION_KILLED = 1927;
const ER_RUN_HOOK_ERROR = 3100;
const ER_TRANSACTION_ROLLBACK_DURING_COMMIT = 3101;
const ER_CLIENT_INTERACTION_TIMEOUT = 4031;
/** The server's own limits on a statement's time, MySQL's and MariaDB's. */
const ER_QUERY_TIMEOUT = 3024;
const ER_STATEMENT_TIMEOUT = 1969;

const CONFLICTS = new Set([
  ER_CHECKREAD,
  ER_LOCK_WAIT_TIMEOUT,
  ER_LOCK_DEADLOCK,
  ER_TRANSACTION_ROLLBACK_DURING_COMMIT,
]);
const READ_ONLY = new Set([
  ER_OPTION_PREVENTS_STATEMENT,
  ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION,
  ER_READ_ONLY_MODE,
  ER_RUN_HOOK_ERROR,
]);
const GOING_AWAY = new Set([
  ER_SERVER_SHUTDOWN,
  ER_CON_COUNT_ERROR,
  ER_QUERY_INTERRUPTED,
  ER_CONNECTION_KILLED,
  ER_CLIENT_INTERACTION_TIMEOUT,
  ER_QUERY_TIMEOUT,
  ER_STATEMENT_TIMEOUT,
]);

/** A statement took longer than it may; its connection is gone, and what became of it is not known. */
export class StatementTimeout extends Error {
  constructor() {
    super('A statement took longer than database.statement_timeout_ms, or than anybody waited');
    this.name = 'StatementTimeout';
  }
}

/** No connection could be had in time. */
export class NoConnection extends Error {
  constructor(cause: unknown) {
    super('No database connection could be had in time', { cause });
    this.name = 'NoConnection';
  }
}

/**
 * - `conflict`: others were in the way; the same transaction may succeed now.
 * - `lost`: the connection or the server went away, or answers to no writes; another connection may do better.
 * - `defect`: anything else.
 */
export function kindOf(error: unknown): 'conflict' | 'lost' | 'defect' {
  if (error instanceof StatementTimeout || error instanceof NoConnection) return 'lost';
  if (!(error instanceof Error)) return 'defect';
  const { errno, fatal, code } = error as { errno?: number; fatal?: boolean; code?: string };
  if (errno !== undefined && CONFLICTS.has(errno)) return 'conflict';
  if (errno !== undefined && (READ_ONLY.has(errno) || GOING_AWAY.has(errno))) return 'lost';
  // mysql2 reports what happened to the socket with a code of the system, and marks as fatal what ends a connection;
  // after a KILL there is nothing but that mark.
  if (fatal === true || /^(E[A-Z]+|PROTOCOL_[A-Z_]+)$/.test(code ?? '')) return 'lost';
  return 'defect';
}

/** Whether the server said that COMMIT did not happen. Any other error of a COMMIT leaves that open. */
export function saysNotCommitted(error: unknown): boolean {
  const { errno } = error as { errno?: number };
  return errno !== undefined && (CONFLICTS.has(errno) || READ_ONLY.has(errno));
}

/** Whether the server takes no writes: it was never the primary, or is not any more. */
export function isReadOnly(error: unknown): boolean {
  const { errno } = error as { errno?: number };
  return errno !== undefined && READ_ONLY.has(errno);
}
