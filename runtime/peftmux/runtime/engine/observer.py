"""What the engine reports while it works. The server's metrics implement it; nothing here knows Prometheus."""

from __future__ import annotations

from typing import Protocol


class EngineObserver(Protocol):
    """Called from the engine's thread; must not block. Times are seconds."""

    def step(self, seconds: float, tokens: int) -> None: ...

    def scheduled(self, queue_seconds: float) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def inter_token(self, seconds: float) -> None: ...

    def finished(
        self, reason: str, seconds: float, adapter: str, prompt_tokens: int, generated_tokens: int
    ) -> None: ...

    def adapter_loaded(self, seconds: float) -> None: ...

    def adapter_refused(self) -> None: ...

    def graphs_failed(self) -> None:
        """Decode steps cannot be captured on this device: every step runs as it comes."""
        ...


class NullObserver:
    """Reports to nobody."""

    def step(self, seconds: float, tokens: int) -> None:
        pass

    def scheduled(self, queue_seconds: float) -> None:
        pass

    def first_token(self, seconds: float) -> None:
        pass

    def inter_token(self, seconds: float) -> None:
        pass

    def finished(self, reason: str, seconds: float, adapter: str, prompt_tokens: int, generated_tokens: int) -> None:
        pass

    def adapter_loaded(self, seconds: float) -> None:
        pass

    def adapter_refused(self) -> None:
        pass

    def graphs_failed(self) -> None:
        pass
