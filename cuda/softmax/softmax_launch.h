// SPDX-License-Identifier: Apache-2.0
// Between the host's dispatch (softmax.cu) and the kernels: the .cu files beside this header
// compile the kernels of one element type, or of one way to read a row.
#pragma once

#include "fastkern/softmax.h"

namespace fastkern::cuda::softmax_detail {

/// Rows in the registers or the shared memory of those who own them, as `plan` says; T is an
/// element type of tile::Pack. Defined for f32, f16, bf16 and Mixed in files of their own.
template <class T>
void launch_fwd(const SoftmaxFwd& args, const Plan& plan, Stream stream);
template <class T>
void launch_bwd(const SoftmaxBwd& args, const Plan& plan, Stream stream);

/// Rows that are too long for that.
void launch_fwd_segments(const SoftmaxFwd& args, Stream stream);
void launch_bwd_segments(const SoftmaxBwd& args, Stream stream);
/// Bytes that those need.
std::size_t segments_bytes(std::int64_t rows, std::int64_t n);

/// Gradients of logsumexp, rows of any length.
void launch_logsumexp_bwd(const SoftmaxBwd& args, Stream stream);

/// Over the middle one of three dimensions.
void launch_fwd_middle(const SoftmaxFwd& args, Stream stream);
void launch_bwd_middle(const SoftmaxBwd& args, Stream stream);

}  // namespace fastkern::cuda::softmax_detail
