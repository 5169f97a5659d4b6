"""Pipeline parallelism: the layers are split over stages, and each batch over microbatches."""
