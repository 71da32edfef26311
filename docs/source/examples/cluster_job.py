"""A rollout on all ranks of a cluster job, without the command line.

    torchrun --nproc-per-node 2 docs/source/examples/cluster_job.py

``launch/torchrun.sh`` and ``sbatch launch/slurm.sbatch`` also accept the file.
"""

from contextlib import nullcontext

from flashdreams.integrations.toy_world.config import TOY_WORLD_PIPELINE, TOY_WORLD_RUNNER
from flashdreams.integrations.toy_world.runner import walk
from flashdreams.parallel import environment
from flashdreams.runtime.video import VideoWriter

BLOCKS = 12

here = environment.init(device="auto")

# No weights are read before the pipeline is sharded: each rank then reads only its slices.
pipeline = TOY_WORLD_PIPELINE.setup(device=here.device, load=False)
mesh = pipeline.build_mesh(here.world_size)
pipeline.parallelize(mesh)
pipeline.load()
pipeline.warm_up()

cache = pipeline.initialize_cache(text=[TOY_WORLD_RUNNER.prompt], seed=0)
poses = walk(TOY_WORLD_RUNNER.actions, BLOCKS)
with (
    VideoWriter("cluster_job.mp4", fps=16, scale=4) if here.is_rank_zero else nullcontext() as video
):
    for index in range(BLOCKS):
        chunk = pipeline.generate(autoregressive_index=index, cache=cache, input=poses[index][None])
        pipeline.finalize(autoregressive_index=index, cache=cache)
        if video is not None:
            video.write(chunk)

if here.is_rank_zero:
    print(f"{BLOCKS} chunks on {mesh.degrees}")
pipeline.drop_graphs()
environment.shutdown()
