/** One caller, and what really became of what it asked for. */
import { timestampMs } from '@bufbuild/protobuf/wkt';
import { type Client, ConnectError, createClient } from '@connectrpc/connect';
import { createGrpcTransport, Http2SessionManager } from '@connectrpc/connect-node';
import type { Connection, RowDataPacket } from 'mysql2/promise';
import { ErrorInfoSchema } from '../../gen/google/rpc/error_details_pb.ts';
import { SessionService } from '../../gen/rekey/v1/session_service_pb.ts';
import { UserService } from '../../gen/rekey/v1/user_service_pb.ts';
import { Wait } from '../../src/call.ts';
import type { Hasher } from '../../src/password/hasher.ts';
import type { Stage } from './stage.ts';

export interface Heard {
  /** `OK`, the server's reason, or `no answer`. */
  readonly reason: string;
  readonly isUnknown: boolean;
  /** Of a success: all that was said. */
  readonly answer: string;
  readonly error: ConnectError | undefined;
}

const UNKNOWN = new Set(['UNAVAILABLE', 'DEADLINE_EXCEEDED', 'CANCELLED', 'INTERNAL', 'no answer']);
const CALL_TIMEOUT_MS = 12_000;

export class Caller {
  readonly users: Client<typeof UserService>;
  readonly sessions: Client<typeof SessionService>;
  readonly #manager: Http2SessionManager;

  constructor(stage: Stage, server = 0) {
    const baseUrl = stage.servers[server]?.url ?? '';
    this.#manager = new Http2SessionManager(baseUrl);
    const transport = createGrpcTransport({ baseUrl, sessionManager: this.#manager });
    this.users = createClient(UserService, transport);
    this.sessions = createClient(SessionService, transport);
  }

  async change(
    { ust, cid, key }: { ust: string; cid: string; key?: string | undefined },
    message: { oldPassword?: string; newPassword: string; userId?: string },
  ): Promise<Heard> {
    const headers = { ust, app: 'CRM', cid, ...(key === undefined ? {} : { 'idempotency-key': key }) };
    return await heard(async () => {
      const response = await this.users.changePassword(message, { headers, timeoutMs: CALL_TIMEOUT_MS });
      const expiry = response.passwordExpiryTime && timestampMs(response.passwordExpiryTime);
      return `${expiry} ${response.sessionsEnded}`;
    });
  }

  dispose(): void {
    this.#manager.abort();
  }
}

export async function heard(call: () => Promise<string>): Promise<Heard> {
  try {
    return { reason: 'OK', isUnknown: false, answer: await call(), error: undefined };
  } catch (error) {
    if (!(error instanceof ConnectError)) throw error;
    const reason = error.findDetails(ErrorInfoSchema)[0]?.reason ?? 'no answer';
    return { reason, isUnknown: UNKNOWN.has(reason), answer: reason, error };
  }
}

/**
 * Which of these passwords is the stored one, and how many successful changes are audited under this cid. Waits
 * for a transaction that holds the user's row.
 */
export async function truthOf(
  db: Connection,
  hasher: Hasher,
  userId: string,
  passwords: readonly string[],
  cid: string,
): Promise<{ password: string; records: number }> {
  await db.query('SET SESSION innodb_lock_wait_timeout = 30');
  await db.query('START TRANSACTION');
  const [users] = await db.query<RowDataPacket[]>(
    'SELECT password_hash FROM users WHERE user_id = ? FOR UPDATE',
    [userId],
  );
  const [records] = await db.query<RowDataPacket[]>(
    "SELECT 1 FROM audit_log WHERE cid = ? AND action = 'ChangePassword' AND outcome = 'ok'",
    [cid],
  );
  await db.query('ROLLBACK');
  for (const password of passwords) {
    if (await hasher.verify(String(users[0]?.password_hash), password, Wait.forMs(10_000)))
      return { password, records: records.length };
  }
  return { password: 'none of them', records: records.length };
}
