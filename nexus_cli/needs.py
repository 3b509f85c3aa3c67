"""What a planned run needs in memory, said before any weights are loaded."""

from nexus.errors import DeviceError
from nexus_cli.jobs import Job
from nexus_cli.making import Engine
from nexus_cli.output import Output


def needed(jobs: list[Job], engine: Engine, out: Output) -> tuple[dict, DeviceError | None]:
    """The memory that jobs need, which is shown, and the error that a run would probably end with, if it would."""
    if not jobs:
        return {}, None
    from nexus import memory
    from nexus.stored import default_model
    model = memory.described(engine.model or default_model(engine.system))
    device = memory.device_of(engine.device)
    largest = max((_asked(job, engine, device, len(jobs)) for job in jobs),
                  key=lambda asked: memory.peak(model, asked))
    peak, room = memory.peak(model, largest), memory.available(device)
    better = memory.advice(model, largest, room) if room is not None else []
    facts = {"peak": peak, "available": room, "device": device, "parts": [part._asdict() for part in model.parts],
             "stages": [stage._asdict() for stage in memory.stages(model, largest)],
             "advice": [{"add": flag, "peak": after} for flag, after in better]}
    for part in model.parts:
        size = "to be fetched" if part.dtype == "?" else f"{part.numbers / 1e6:.1f}M numbers"
        out.note(f"{part.name}: {size}, stored as {part.dtype}")
    for stage in memory.stages(model, largest):
        out.note(f"{stage.name}: {human(stage.weights)} of weights, {human(stage.activations)} beside them")
    free = "unknown" if room is None else human(room)
    out.note(f"about {human(peak)} at most on {device}, {free} available")
    if room is None or peak <= room:
        return facts, None
    steps = "; ".join(f"{flag} ({human(after)})" for flag, after in better)
    return facts, DeviceError(f"about {human(peak)} are needed, {human(room)} are available",
                              hint=f"add, in turn: {steps}" if steps else "another --device or a smaller model")


def human(size: int) -> str:
    """Bytes as a short text."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _asked(job: Job, engine: Engine, device: str, count: int):
    from nexus.api import at_once
    from nexus.memory import Asked
    settings, batch = job.settings, min(at_once(engine.batch_size, device), count)
    width, height = settings.get("width"), settings.get("height")
    if settings.get("outpaint"):
        from nexus.process.outpaint import sized
        from nexus.requests import SampleRequest
        request = sized(SampleRequest.parse(settings), 1)
        width, height = request.width, request.height
    guided = settings.get("prompt") is not None and settings.get("guidance") != 1
    return Asked(width, height, batch, guided, "image" in settings, engine.dtype, device, engine.offload, engine.tile)
