"""GPUs that are not there, as XLA's compiler wants them described."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class GpuTarget:
    """What the compiler asks a GPU for, where there is one; XLA's GpuTargetConfigProto.

    Attributes:
        description: what the driver calls the GPU.
        compute_capability: of CUDA, major and minor.
        dnn_version: of cuDNN, major and minor.
        core_count: streaming multiprocessors.
        fpus_per_core: float32 units of each.
        clock_rate_ghz: at most.
        memory_bandwidth: bytes a second.
        device_memory_size: bytes that a program may have.
        l2_cache_size: bytes.
        shared_memory_per_core: bytes of each multiprocessor.
        shared_memory_per_block: bytes that a block of threads has.
        shared_memory_per_block_optin: bytes that it may ask for.
        threads_per_core_limit: at a time, on a multiprocessor.
        threads_per_block_limit: at most.
        threads_per_warp: that go together.
        registers_per_core_limit: of a multiprocessor.
        registers_per_block_limit: of a block.
        block_dim_limit_x: blocks in a grid's first direction.
        block_dim_limit_y: in its second.
        block_dim_limit_z: in its third.
    """

    description: str
    compute_capability: tuple[int, int]
    dnn_version: tuple[int, int]
    core_count: int
    fpus_per_core: int
    clock_rate_ghz: float
    memory_bandwidth: int
    device_memory_size: int
    l2_cache_size: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    shared_memory_per_block_optin: int
    threads_per_core_limit: int
    threads_per_block_limit: int = 1024
    threads_per_warp: int = 32
    registers_per_core_limit: int = 65_536
    registers_per_block_limit: int = 65_536
    block_dim_limit_x: int = 2_147_483_647
    block_dim_limit_y: int = 65_535
    block_dim_limit_z: int = 65_535

    def text(self) -> str:
        """Returns the message as text."""
        apart = ("description", "compute_capability", "dnn_version")
        names = [each.name for each in fields(self) if each.name not in apart]
        lines = [f"  {name}: {getattr(self, name)}" for name in names]
        major, minor = self.compute_capability
        lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
        dnn = "dnn_version_info {{ major: {} minor: {} }}".format(*self.dnn_version)
        return "\n".join(
            [
                "gpu_device_info {",
                *lines,
                "}",
                'platform_name: "CUDA"',
                dnn,
                f'device_description_str: "{self.description}"',
            ]
        )


H100 = GpuTarget(
    description="NVIDIA H100 80GB HBM3",
    compute_capability=(9, 0),
    dnn_version=(9, 8),
    core_count=132,
    fpus_per_core=128,
    clock_rate_ghz=1.98,
    memory_bandwidth=3_352_320_000_000,
    device_memory_size=84_978_434_048,
    l2_cache_size=52_428_800,
    shared_memory_per_core=233_472,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    threads_per_core_limit=2048,
)
