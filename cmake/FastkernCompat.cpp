// SPDX-License-Identifier: Apache-2.0
// Local definitions of what GCC >= 9 and glibc >= 2.29 would otherwise import in versions that a
// manylinux_2_28 system lacks. They stay private to the library that links them.
#include <dlfcn.h>

#include <exception>
#include <new>
#include <sstream>
#include <string>

extern "C" {
// libstdc++ skips atomics where this says "one thread". Zero is always right.
char __libc_single_threaded = 0;

// glibc 2.29 (fmod: 2.38) gave these new versions, which differ in what errno says.
double old_exp(double);
double old_log(double);
double old_pow(double, double);
double old_fmod(double, double);
float old_fmodf(float, float);
__asm__(".symver old_exp,exp@GLIBC_2.2.5");
__asm__(".symver old_log,log@GLIBC_2.2.5");
__asm__(".symver old_pow,pow@GLIBC_2.2.5");
__asm__(".symver old_fmod,fmod@GLIBC_2.2.5");
__asm__(".symver old_fmodf,fmodf@GLIBC_2.2.5");
double exp(double x) { return old_exp(x); }
double log(double x) { return old_log(x); }
double pow(double x, double y) { return old_pow(x, y); }
double fmod(double x, double y) { return old_fmod(x, y); }
float fmodf(float x, float y) { return old_fmodf(x, y); }
}

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// The default constructors of the string streams, GLIBCXX_3.4.26.
template basic_stringstream<char>::basic_stringstream();
template basic_ostringstream<char>::basic_ostringstream();
template basic_istringstream<char>::basic_istringstream();

// The C++20 forms of str(), GLIBCXX_3.4.29.
template string basic_stringbuf<char>::str() const&;
template string basic_stringbuf<char>::str() &&;
template string basic_stringstream<char>::str() const&;
template string basic_stringstream<char>::str() &&;
template string basic_ostringstream<char>::str() const&;
template string basic_ostringstream<char>::str() &&;

// Reference counting of exception_ptr, CXXABI_1.3.13: GCC 11 inlined the functions that used to do
// it. Every libstdc++ still exports those; asking for them by name keeps the inlined ones out.
namespace __exception_ptr {
void exception_ptr::_M_addref() noexcept {
  using Copy = void (*)(void*, const exception_ptr*);
  static const auto copy =
      reinterpret_cast<Copy>(dlsym(RTLD_DEFAULT, "_ZNSt15__exception_ptr13exception_ptrC1ERKS0_"));
  void* owner;  // never destroyed, so it keeps the count it took
  copy(&owner, this);
}

void exception_ptr::_M_release() noexcept {
  using Destroy = void (*)(exception_ptr*);
  static const auto destroy =
      reinterpret_cast<Destroy>(dlsym(RTLD_DEFAULT, "_ZNSt15__exception_ptr13exception_ptrD1Ev"));
  destroy(this);
}
}  // namespace __exception_ptr
}  // namespace std
