"""Does kill -9 lose or double anything? Real workers on a real S3 server, killed by the hundred, and all counted."""
