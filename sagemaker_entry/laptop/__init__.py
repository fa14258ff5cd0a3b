"""The laptop's side: AWS account, plan, upload, submission, following and fetching a job."""
