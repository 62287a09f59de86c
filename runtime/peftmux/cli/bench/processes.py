"""The processes that a benchmark drives: `peftmux serve` over gRPC, and the opponents over a pipe."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import grpc.aio

from peftmux.cli.bench.workload import Job, Workload
from peftmux.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

_START_SECONDS = 300


class Served:
    """A `peftmux serve` process and one channel to it."""

    def __init__(self, model: Path, adapters: Path, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "peftmux.cli.main", "serve", str(model), "--adapters", str(adapters)]
        self._process = subprocess.Popen(
            [*command, "--grpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0", *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._await_address()

    def _await_address(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            for word in line.replace(",", " ").split():
                if word.startswith("127.0.0.1:"):
                    return word
        raise RuntimeError(f"`peftmux serve` ended with status {self._process.wait()} before it was ready")

    async def load(self, names: Sequence[str]) -> None:
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = adapters_pb2_grpc.AdapterServiceStub(channel)
            for name in names:
                await stub.LoadAdapter(adapters_pb2.LoadAdapterRequest(name=name, source=name, wait=True))

    async def run(self, workload: Workload, adapters: Sequence[str]) -> float:
        """Seconds for all jobs at once, job i with adapter i modulo their number ("" is the base)."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            messages = [_message(job, adapters[i % len(adapters)]) for i, job in enumerate(workload.jobs)]
            await channel.channel_ready()
            started = time.perf_counter()
            answers = await asyncio.gather(*(stub.Generate(message) for message in messages))
            seconds = time.perf_counter() - started
        made = sum(len(answer.token_ids) for answer in answers)
        if made != workload.new_tokens:
            raise RuntimeError(f"expected {workload.new_tokens} tokens from the server, got {made}")
        return seconds

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _message(job: Job, adapter: str) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        adapter=adapter,
        token_ids=inference_pb2.TokenIds(ids=job.prompt),
        sampling=inference_pb2.SamplingParams(temperature=0),
        stopping=inference_pb2.StoppingParams(max_tokens=job.new_tokens, ignore_eos=True),
    )


class Opponents:
    """transformers' engines in their own process, so that neither side holds the other's threads or memory."""

    def __init__(self, model: Path, device: str, threads: int | None) -> None:
        command = [sys.executable, "-m", "peftmux.cli.bench.opponents", str(model), "--device", device]
        if threads:
            command += ["--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, engine: str, workload: Workload) -> float:
        """Seconds for the workload."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"engine": engine, "jobs": json.loads(workload.to_json())}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"transformers' {engine} ended with status {self._process.wait()}")
        return float(json.loads(answer)["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def __enter__(self) -> Opponents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
