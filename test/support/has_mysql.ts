/** Ends with 0 if the real MySQL can be brought up on this machine; otherwise says why not. */
import { startPrivateDatabase } from './private_database.ts';

try {
  const server = await startPrivateDatabase({ kind: 'mysql' });
  await server.dispose();
} catch (error) {
  process.stderr.write(`${(error as Error).message}\n`);
  process.exitCode = 1;
}
