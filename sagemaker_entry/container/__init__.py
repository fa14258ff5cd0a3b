"""The container's side, on each host of a job: channels, installation, torchrun, the other hosts, failures."""
