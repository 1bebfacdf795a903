/** Processes of the benchmark's own that answer questions, one after the other, and end with the one that asks. */
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';

export interface Child<Question, Answer> {
  readonly pid: number;
  ask(question: Question): Promise<Answer>;
  end(): Promise<void>;
}

interface Reply {
  readonly answer?: unknown;
  readonly problem?: string;
}

/** @param script beside this file. Its first message says that it is ready. */
export async function startChild<Question, Answer>(
  script: string,
  environment: Record<string, string> = {},
): Promise<Child<Question, Answer>> {
  const child: ChildProcess = fork(new URL(script, import.meta.url), {
    env: { ...process.env, ...environment },
    serialization: 'advanced',
    stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
  });
  const exited = once(child, 'exit');
  const reply = async (): Promise<Reply> => {
    const first = await Promise.race([once(child, 'message'), exited.then(() => undefined)]);
    if (!first) throw new Error(`${script} ended before its time`);
    return first[0] as Reply;
  };
  await reply();
  return {
    pid: child.pid as number,
    ask: async (question) => {
      child.send(question as object);
      const { answer, problem } = await reply();
      if (problem !== undefined) throw new Error(`${script}: ${problem}`);
      return answer as Answer;
    },
    end: async () => {
      if (child.connected) child.disconnect();
      await exited;
    },
  };
}

/** The child's side. */
export function answerQuestions<Question, Answer>(answer: (question: Question) => Promise<Answer>): void {
  process.on('message', async (question) => {
    try {
      process.send?.({ answer: await answer(question as Question) });
    } catch (error) {
      process.send?.({ problem: (error as Error).stack ?? String(error) });
    }
  });
  process.on('disconnect', () => process.exit());
  process.send?.({ answer: 'ready' });
}
