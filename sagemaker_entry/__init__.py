"""Training on Amazon SageMaker: who runs where.

`laptop/` runs on the user's machine, started by `launch.py`: it plans, uploads and starts a job, follows it, and
fetches the model. Only this folder uses boto3 and the SageMaker SDK.
`container/` runs on each host of the job, started by `train.py`: it reads SageMaker's folders and variables, runs
torchrun with one `container.worker` process for each GPU, and writes the model or the reason for the failure.
`protocol/` is what both sides read and write: the job, the dataset's manifest, the progress lines, the instance types.
`inference.py` runs in an endpoint's container and serves the model that a job has left.
"""
