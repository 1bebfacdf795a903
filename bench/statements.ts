/** What goes to the database, counted on the wire. */
import { startWireProxy } from '../test/support/mysql_wire.ts';

export interface StatementCounter {
  /** The database's URL, by way of the counter. */
  readonly url: string;
  /** Runs `work` and counts what is sent meanwhile: each is one round trip. @returns how often, by statement. */
  during<T>(work: () => Promise<T>): Promise<{ result: T; statements: ReadonlyMap<string, number> }>;
  close(): Promise<void>;
}

/** What a server does by itself, whether it is called or not. */
const BACKGROUND = /^(SELECT 1$|SELECT GET_LOCK|SELECT RELEASE_LOCK|DELETE )/;

export async function countStatements(databaseUrl: string): Promise<StatementCounter> {
  const proxy = await startWireProxy(databaseUrl);
  return {
    url: proxy.through(databaseUrl),
    during: async (work) => {
      const statements = new Map<string, number>();
      proxy.decide = ({ kind, sql }) => {
        const name = kind === 'prepare' ? `PREPARE ${nameOf(sql)}` : nameOf(sql || kind);
        if (!BACKGROUND.test(sql)) statements.set(name, (statements.get(name) ?? 0) + 1);
        return 'pass';
      };
      try {
        return { result: await work(), statements };
      } finally {
        proxy.decide = undefined;
      }
    },
    close: () => proxy.close(),
  };
}

/** A statement's beginning, enough to know it again: `UPDATE users SET old_password_attempts`. */
export function nameOf(sql: string): string {
  const line = sql.replace(/\s+/g, ' ').trim();
  const name =
    /^(SELECT).* FROM (\w+)|^(INSERT INTO|DELETE FROM) (\w+)|^(UPDATE) (\w+)(?: \w+)? SET (\w+)|^(UPDATE) (\w+)/.exec(
      line,
    );
  return name ? name.slice(1).filter(Boolean).join(' ') : line.slice(0, 40);
}
