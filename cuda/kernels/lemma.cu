// Every kernel in one module.
#include "attention.cu"
#include "attention_batch.cu"
#include "gemm.cu"
#include "gemm_f16.cu"
#include "matvec.cu"
#include "moe.cu"
#include "rows.cu"
#include "step.cu"
